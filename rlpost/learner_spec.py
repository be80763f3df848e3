"""What a learner is started with: plain values, no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rlpost.grpo.loss import LossSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a learner is started with. Defaults are design section 8's."""

    model: str  # a folder
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base (lora), of the products (full)
    engine_dtype: str = ""  # "": like dtype
    method: Literal["lora", "full"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    adapter: str = ""  # a PEFT folder to start from
    lora_head: bool = False
    learning_rate: float = 5e-5
    warmup: int = 5  # updates
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    loss: str = "cispo"
    clip_low: float | None = None
    clip_high: float | None = None
    ratio_cap: float = 3.0
    correction: str = "none"
    correction_cap: float = 3.0
    kl_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    guard: float = 0.5
    reply_limit: int = 0  # dr_grpo divides by it; 0: the longest completion of the update
    keep_start: bool = (
        False  # full: keep a frozen copy of the start policy to measure the KL against
    )
    micro_batch_tokens: int = 4096
    layout: Literal["auto", "packed", "padded"] = "auto"
    checkpointing: bool = False  # of layers: saves memory, costs a third more time
    device: str = "cpu"
    seed: int = 0

    def loss_spec(self) -> "LossSpec":
        """The loss's own knobs. Raises ValueError for a loss or correction that does not exist."""
        from rlpost.grpo.loss import LossSpec

        return LossSpec(
            kind=self.loss,  # type: ignore[arg-type]  # LossSpec checks it
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio_cap=self.ratio_cap,
            correction=self.correction,
            correction_cap=self.correction_cap,
            kl_coefficient=self.kl_coefficient,
            entropy_coefficient=self.entropy_coefficient,
            guard=self.guard,
        )
