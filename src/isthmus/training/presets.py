"""Options of training, and the recipes of the papers."""

import dataclasses
import math
from dataclasses import dataclass

from isthmus.errors import InputError

WARM_FRACTION, START_FACTOR = 0.3, 1 / 25  # of one_cycle, as in torch.optim.lr_scheduler.OneCycleLR


@dataclass(frozen=True)
class TrainOptions:
    """How a network is trained.

    Attributes:
        optimizer: "sgd" (with momentum), "adam" or "adamw".
        learning_rate: the peak of the schedule.
        momentum: of sgd.
        weight_decay: L2 penalty on every parameter, added to the gradient; of adamw the share, times the learning rate,
            by which every parameter shrinks in a step.
        epochs: passes over the training samples.
        batch_size: samples a step; the samples of an epoch are cut into steps that differ by one sample at most.
        schedule: after the warm-up "constant", "linear" to zero, or "cosine" to zero; "one_cycle" is cosine up from
            1/25 over 30 % of all steps, then cosine to zero, and takes no other warm-up.
        warmup: epochs in which the rate rises linearly from zero.
        augment: random horizontal flip and random crop after padding by 4 black pixels.
        label_smoothing: share of the target spread over all classes.
        precision: "float32", or "bf16" autocast with float32 weights.
        channels_last: memory format during training.

    Raises:
        InputError: a value out of range.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 10
    batch_size: int = 128
    schedule: str = "one_cycle"
    warmup: float = 0.0
    augment: bool = False
    label_smoothing: float = 0.0
    precision: str = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", ("sgd", "adam", "adamw")),
            ("schedule", ("one_cycle", "linear", "cosine", "constant")),
            ("precision", ("float32", "bf16")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"training option {name}={getattr(self, name)!r}; take one of {', '.join(known)}")
        if self.schedule == "one_cycle" and self.warmup:
            raise InputError(f"training option warmup={self.warmup}: one_cycle has its own warm-up; leave it 0")
        for name, low, high in (
            ("learning_rate", 0, math.inf),
            ("momentum", 0, 1),
            ("weight_decay", 0, math.inf),
            ("epochs", 0, math.inf),
            ("batch_size", 1, math.inf),
            ("warmup", 0, self.epochs),
            ("label_smoothing", 0, 1),
        ):
            value = getattr(self, name)
            if not (low <= value <= high and math.isfinite(value)):
                raise InputError(f"training option {name}={value} must lie between {low} and {high}")


_HOROI = TrainOptions(
    weight_decay=5e-4,
    epochs=200,
    batch_size=500,
    schedule="linear",
    warmup=5.0,
    augment=True,
    precision="bf16",
    channels_last=True,
)


_ITO = TrainOptions(
    learning_rate=0.4, weight_decay=5e-4, epochs=100, batch_size=500, schedule="cosine", warmup=1.0, augment=True
)


_CPU = TrainOptions(weight_decay=5e-4, batch_size=128, augment=True, precision="bf16", channels_last=True)


PRESETS: dict[str, TrainOptions] = {
    # Horoi et al. 2024 (arXiv 2407.05385), for vgg11 without batch normalisation and resnet20?shortcut=conv3x3.
    "horoi2024_vgg11": dataclasses.replace(_HOROI, learning_rate=0.08),
    "horoi2024_resnet20": dataclasses.replace(_HOROI, learning_rate=0.5),
    # Ito et al. 2025 (arXiv 2402.04051). Schedule, warm-up and augmentation are not stated where we could read them:
    # those below are ours. For vgg11_bn?width=4 and resnet20?width=16.
    "ito2025_mlp": TrainOptions("adam", learning_rate=1e-3, epochs=5, batch_size=500, schedule="constant"),
    "ito2025_vgg11": _ITO,
    "ito2025_resnet20": _ITO,
    # For one CPU core: digits chosen on 300 held-out training images, the others set once and not tuned. cpu_vgg11 is
    # for vgg11_bn?width=0.25.
    "cpu_digits": TrainOptions("adam", learning_rate=3e-3, epochs=20, batch_size=64),
    "cpu_mlp": TrainOptions("adam", learning_rate=1e-3, epochs=10, batch_size=500, schedule="constant"),
    "cpu_vgg11": dataclasses.replace(_CPU, learning_rate=0.1, epochs=20),
    "cpu_resnet20": dataclasses.replace(_CPU, learning_rate=0.2, epochs=17),
    # For gpt?width=128 on tinyshakespeare, its learning rate chosen after one epoch on a held-out tenth of the training
    # text; and for vit?width=96&depth=3&patch=4 on cifar10, set once.
    "cpu_gpt": TrainOptions(
        "adamw",
        learning_rate=4e-3,
        weight_decay=0.1,
        epochs=5,
        batch_size=16,
        schedule="cosine",
        warmup=0.25,
        precision="bf16",
    ),
    "cpu_vit": TrainOptions(
        "adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        epochs=20,
        batch_size=128,
        schedule="cosine",
        warmup=0.5,
        augment=True,
        precision="bf16",
    ),
}
