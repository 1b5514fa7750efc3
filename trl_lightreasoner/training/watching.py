"""Metrics watched during training: the distance from the original expert, and the model's certainty.

With its adapter switched off, the model is the expert, if the adapter starts at zero or the labels were made without
it, as those of a later round are. No second model is in memory.
Both warnings compare with the labels: a model that has learned them, pi_theta = v_C, is D_KL(v_C || pi_E) away from
the expert and has the entropy of v_C.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import logging

from ..contrast import CHUNK_ELEMENTS, step_divergence
from ..steps.dataset import read_samplings


logger = logging.get_logger(__name__)

# Multiple of the labels' divergence, and fraction of the labels' entropy
_MAX_DRIFT = 2.0
_MIN_ENTROPY = 0.5


def is_expert_without_adapter(
    model: torch.nn.Module, dataset: Dataset | IterableDataset, accelerator: Accelerator
) -> bool:
    """
    Whether the model with its adapter switched off is the expert of the labels: the expert that training starts from,
    if a LoRA adapter changes nothing yet, or the one that `label_expert="base"` names. Call it before training, on all
    processes.
    """
    if not isinstance(model, PeftModel):
        return False
    configs = model.peft_config.values()
    plain = all(isinstance(config, LoraConfig) and config.bias == "none" for config in configs)
    if plain and _are_of_base(dataset):  # an adapter that begins with a share of the weights takes it from the base
        return all(config.init_lora_weights in (True, False, "gaussian") for config in configs)
    # These are zero at first, unless the adapter was trained before or begins with a share of the weights (PiSSA);
    # under FSDP the weights can be on the main process alone
    zero = [p for n, p in model.named_parameters() if "lora_B" in n or "lora_embedding_A" in n]
    adapts = not plain or any(not p.is_meta and p.any() for p in zero)
    return not accelerator.reduce(torch.tensor(float(adapts), device=accelerator.device), reduction="sum")


def _are_of_base(dataset: Dataset | IterableDataset) -> bool:
    """Whether all labels are of an expert without adapter, although some of the answers are of one with an adapter."""
    samplings = read_samplings([dataset]) if isinstance(dataset, Dataset) else []
    of_base = [(each.get("settings") or {}).get("label_expert") == "base" for each in samplings]
    without = [isinstance(each.get("expert"), dict) and not each["expert"].get("adapter") for each in samplings]
    return any(of_base) and all(map(max, of_base, without))


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Context with the adapter switched off. Afterwards the trainable parameters are as before."""
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with model.disable_adapter():
        yield
    for parameter, value in requires_grad.items():  # PEFT makes the whole active adapter trainable
        if parameter.requires_grad != value:
            parameter.requires_grad_(value)


def divergence_at(logits: torch.Tensor, expert_logits: torch.Tensor) -> torch.Tensor:
    """
    D_KL(pi_theta || pi_E) of each step.

    Args:
        logits, expert_logits (`torch.Tensor` of shape `(N, V)`): Raw logits of the two, any floating dtype.

    Returns:
        `torch.Tensor` of shape `(N,)`, fp32: Nats.

    Example:

    ```python
    >>> import torch
    >>> divergence_at(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438])

    ```
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    chunks = zip(logits.split(rows), expert_logits.split(rows), strict=True)
    return torch.cat([step_divergence(*(part.float().log_softmax(-1) for part in chunk)) for chunk in chunks])


class DriftWarnings:
    """
    Warns once if the entropy collapses, and once if the drift passes its threshold.

    Attributes:
        told (`set[str]`): The warnings given: `"entropy"`, `"drift"`, both or neither.
    """

    def __init__(self):
        self.told: set[str] = set()

    def look_at(self, means: dict[str, float], prefix: str) -> None:
        """
        Check new measurements, and warn if necessary.

        Args:
            means (`dict[str, float]`): Means over the steps, in nats: `entropy` and `label_entropy`, and if the expert
                is available, `kl_to_expert` and `expert_loss`.
            prefix (`str`): Prefix of the logged names, such as "eval".
        """
        entropy, label_entropy = means["entropy"], means["label_entropy"]
        if entropy < _MIN_ENTROPY * label_entropy:
            self._tell(
                "entropy",
                f"The entropy has collapsed: `{prefix}_entropy` is {entropy:.3g} nats, less than half of the "
                f"{label_entropy:.3g} of the labels: the model is more certain than its labels.",
            )
        drift, asked = means.get("kl_to_expert", 0.0), means.get("expert_loss", 0.0)
        if drift > _MAX_DRIFT * asked:
            self._tell(
                "drift",
                f"The model drifts: `{prefix}_kl_to_expert` is {drift:.3g} nats, more than twice the labels' "
                f"divergence from the expert, {asked:.3g} nats.",
            )

    def _tell(self, kind: str, what: str) -> None:
        if kind not in self.told:
            self.told.add(kind)
            logger.warning(
                f"{what} Lower `learning_rate` or the number of updates, or return to an earlier checkpoint. "
                "`lightreasoner eval --baseline` shows whether the answers are worse."
            )
