"""A table at the end: each suite's figure beside its target, as `record_property("figure", …)` said
it. It is made from the reports, so it is whole under xdist as well."""

ORDER = (
    "official JSON Schema suite, with remotes, formats off",
    "maskbench, formats on",
    "math cases",
    "GSM8K golds against themselves",
    "GSM8K golds off by one",
    "BFCL right predictions",
    "BFCL wrong predictions",
    "hostile input",
    "hostile rewards",
)


def pytest_terminal_summary(terminalreporter):
    sums: dict[tuple[str, str], list[int]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") != "call":
                continue
            for name, value in report.user_properties:
                if name == "figure":
                    check, target, right, total = value
                    sums.setdefault((check, target), [0, 0])
                    sums[check, target][0] += right
                    sums[check, target][1] += total
    if not sums:
        return
    place = {check: number for number, check in enumerate(ORDER)}
    terminalreporter.write_line("\n| check | figure | at least |\n|---|---|---|")
    for (check, target), (right, total) in sorted(sums.items(), key=lambda i: place[i[0][0]]):
        share = f"{right / total:.2%}" if right < total else "all"
        terminalreporter.write_line(f"| {check} | {share} ({right:,} of {total:,}) | {target} |")
