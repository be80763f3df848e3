"""The three kinds of panel that the boards are made of, and the board itself.

In an expression `{run` stands for `{run_id=~"$run_id"`, so that one board serves one run or all of
them, and `[rate]` for Grafana's own interval. A panel's description begins with the metrics that
its queries read, says what they mean and then what to do: whoever is woken by a red number should
not have to look elsewhere first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as prometheus_models

SOURCE = common_models.DataSourceRef(type_val="prometheus", uid="$datasource")
GREEN, ORANGE, RED = "green", "orange", "red"


@dataclass(frozen=True)
class Query:
    """One line (or several) of a panel."""

    expr: str
    legend: str = "{{run_id}}"

    @property
    def promql(self) -> str:
        return self.expr.replace("{run", '{run_id=~"$run_id"').replace("[rate]", RATE)

    @property
    def metrics(self) -> list[str]:
        """The declared names in it, without the suffixes of a histogram's series."""
        found = re.findall(r"rlpost_[a-z_]+", self.expr)
        return [re.sub(r"_(bucket|sum|count)$", "", name) for name in found]


RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """`steps` colour a value: [(0.8, ORANGE)] turns it orange from 0.8 on, green below."""

    kind: str  # stat, lines or heat
    title: str
    means: str
    do: str
    queries: Sequence[Query]
    unit: str = "short"
    steps: Sequence[tuple[float, str]] = ()
    width: int = 8
    base: str = GREEN  # the colour below the first step
    low: float | None = None
    high: float | None = None
    log: bool = False

    @property
    def description(self) -> str:
        names = dict.fromkeys(name for query in self.queries for name in query.metrics)
        return f"{', '.join(f'`{name}`' for name in names)}: {self.means}\n\n**Do:** {self.do}"


def number(title: str, means: str, do: str, *queries: Query, **options: object) -> Panel:
    """A stat: the last value, large."""
    return Panel("stat", title, means, do, queries, **({"width": 4} | options))  # type: ignore[arg-type]


def lines(title: str, means: str, do: str, *queries: Query, **options: object) -> Panel:
    """A time series."""
    return Panel("lines", title, means, do, queries, **options)  # type: ignore[arg-type]


def heat(title: str, means: str, do: str, query: Query, **options: object) -> Panel:
    """A heat map of a histogram's buckets."""
    return Panel("heat", title, means, do, [query], **options)  # type: ignore[arg-type]


def quantiles(histogram: str) -> tuple[Query, Query]:
    """Median and 95th percentile of a histogram, by run."""
    rate = f"sum by (run_id, le) (rate({histogram}_bucket{{run}}[rate]))"
    return (
        Query(f"histogram_quantile(0.5, {rate})", "{{run_id}} median"),
        Query(f"histogram_quantile(0.95, {rate})", "{{run_id}} 95%"),
    )


def render(panel: Panel, number: int) -> object:
    """The SDK's builder of a panel."""
    makers = {"stat": _stat, "lines": _lines, "heat": _heat}
    built = makers[panel.kind](panel)
    steps = [models.Threshold(value=None, color=panel.base)]
    steps += [models.Threshold(value=value, color=color) for value, color in panel.steps]
    built.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    built.id(number).title(panel.title).description(panel.description).datasource(SOURCE)
    built.unit(panel.unit).no_value("No traffic").span(panel.width)
    built.height(4 if panel.kind == "stat" else 8)
    if panel.low is not None:
        built.min(panel.low)
    if panel.high is not None:
        built.max(panel.high)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).datasource(SOURCE).expr(query.promql)
        target.legend_format(query.legend)
        if panel.kind == "heat":
            target.format(prometheus_models.PromQueryFormat.HEATMAP)
        _ = target.instant() if panel.kind == "stat" else target.range()
        built.with_target(target)
    return built


def _stat(panel: Panel) -> stat.Panel:
    calculation = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
    built = stat.Panel().reduce_options(calculation)
    color = common_models.BigValueColorMode.VALUE
    built.color_mode(color).graph_mode(common_models.BigValueGraphMode.NONE)
    return built.text_mode(common_models.BigValueTextMode.VALUE_AND_NAME)


def _lines(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    legend.display_mode(common_models.LegendDisplayMode.LIST)
    legend.placement(common_models.LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
    built = timeseries.Panel().legend(legend).tooltip(tooltip).line_width(1).fill_opacity(5)
    if panel.steps:
        dashed = common_models.GraphThresholdsStyleMode.DASHED
        built.thresholds_style(common.GraphThresholdsStyleConfig().mode(dashed))
    if panel.log:
        scale = common.ScaleDistributionConfig().type(common_models.ScaleDistribution.LOG).log(10)
        built.scale_distribution(scale)
    return built


def _heat(panel: Panel) -> heatmap.Panel:
    return heatmap.Panel().y_axis(heatmap.YAxisConfig().unit(panel.unit)).calculate(False)


def board(
    uid: str, title: str, description: str, rows: Sequence[tuple[str, Sequence[Panel]]]
) -> models.Dashboard:
    """A board of titled rows; panel numbers are given in reading order and stay when nothing
    moves."""
    made = dashboard.Dashboard(title).uid(uid).description(description).tags(["rlpost"])
    made.editable().refresh("10s").time("now-3h", "now").timezone("browser")
    made.tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.with_variable(
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    )
    made.with_variable(
        dashboard.QueryVariable("run_id")
        .label("Run")
        .datasource(SOURCE)
        .query({"query": "label_values(rlpost_update, run_id)", "refId": "run_id"})
        .definition("label_values(rlpost_update, run_id)")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )
    for tag, name in (("rlpost", "rlpost"), ("vllm", "vLLM's boards")):
        link = dashboard.DashboardLink(name).type(models.DashboardLinkType.DASHBOARDS).tags([tag])
        made.link(link.as_dropdown(tag != "rlpost").keep_time(True).include_vars(tag == "rlpost"))
    ray = dashboard.DashboardLink("Ray").type(models.DashboardLinkType.LINK)
    made.link(ray.url("/d/rayDefaultDashboard").keep_time(True).tooltip("Ray's own board"))
    count = 0
    for name, panels in rows:
        made.with_row(dashboard.Row(name))
        for panel in panels:
            count += 1
            made.with_panel(render(panel, count))
    return made.build()
