"""The flags of an export: which model, which files, and on which data they are calibrated and compared."""

from dataclasses import dataclass, field

from prunelle.errors import InputError
from prunelle.export.calibration import CALIBRATION_METHODS
from prunelle.export.onnx import OPSET_VERSION
from prunelle.export.quantization import INT4_BLOCK_SIZE, INT4_BLOCK_SIZES
from prunelle.export.variants import VARIANTS
from prunelle.tasks import DataArguments, TaskName

LOWEST_OPSET_VERSION = 18  # below it the exporter writes what it then has to convert, not always rightly


@dataclass
class ExportArguments:
    """What is exported, and to which files."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A checkpoint folder or hub model."})
    output_dir: str | None = field(default=None, metadata={"help": "A folder that is new or empty."})
    variants: list[str] = field(
        default_factory=lambda: ["fp32", "int8-dynamic"],
        metadata={"help": "Which files to write.", "choices": list(VARIANTS)},
    )
    opset_version: int = field(
        default=OPSET_VERSION,
        metadata={"help": "23 needs onnxruntime 1.23; from 18 on for older ones, where attention is slower."},
    )
    int4_block_size: int = field(
        default=INT4_BLOCK_SIZE,
        metadata={"help": "Weights that share a scale (int4).", "choices": list(INT4_BLOCK_SIZES)},
    )
    calibration_file: str | None = field(
        default=None,
        metadata={"help": "Texts to calibrate on (int8-static), labels not needed; by default the training data."},
    )
    calibration_method: str = field(
        default="minmax",
        metadata={"help": "How ranges follow from what was seen (int8-static).", "choices": list(CALIBRATION_METHODS)},
    )
    calibration_samples: int = field(default=256, metadata={"help": "How many texts to calibrate on (int8-static)."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Examples run at once."})
    latency_seconds: float = field(
        default=20.0, metadata={"help": "How long to measure latency in all, where there is data to compare on."}
    )
    seed: int = field(
        default=42,
        metadata={"help": "Draws the calibration texts, and held-out data as the run did that trained with it."},
    )

    max_accuracy_drop: float | None = field(
        default=None,
        metadata={
            "help": "How many points int8-dynamic may lose on the validation data: the fewest modules, the most "
            "sensitive, are left in float32 for that."
        },
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Put the folder on the Hub, into --hub_model_id."})
    hub_model_id: str | None = field(default=None, metadata={"help": "By default the output folder's name."})
    hub_token: str | None = field(default=None, metadata={"help": "By default that of `hf auth login`."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "For a repository that is new."})
    hub_revision: str | None = field(default=None, metadata={"help": "The branch to push to."})

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise InputError("no model: give --model_name_or_path FOLDER or a hub model's name")
        if self.output_dir is None:
            raise InputError("no output folder: give --output_dir DIR")
        if self.opset_version < LOWEST_OPSET_VERSION:
            raise InputError(f"--opset_version {self.opset_version} is too low: give {LOWEST_OPSET_VERSION} or more")
        for name in ("calibration_samples", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.max_accuracy_drop is not None and self.max_accuracy_drop < 0:
            raise InputError(f"--max_accuracy_drop {self.max_accuracy_drop} must not be negative")
        if self.max_accuracy_drop is not None and not {"fp32", "int8-dynamic"} <= set(self.variants):
            raise InputError("--max_accuracy_drop holds int8-dynamic against fp32: give both in --variants")
        if self.latency_seconds < 0:
            raise InputError(f"--latency_seconds {self.latency_seconds} must not be negative")
        if self.calibration_file is not None and "int8-static" not in self.variants:
            raise InputError("--calibration_file is for int8-static: add it to --variants")


@dataclass
class ExportDataArguments(DataArguments):
    """The data of `DataArguments`, of which nothing must be given and a file to evaluate on is enough."""

    # Wider than the base's, where a task is always named: here the checkpoint may name it.
    task: TaskName | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "By default what the model's head is for."}
    )

    def __post_init__(self) -> None:
        self.has_training_data = self.dataset_name is not None or self.train_file is not None
        self.has_validation_data = self.has_training_data or self.validation_file is not None
        evaluated = self.validation_file or self.test_file
        self.is_given = self.has_training_data or evaluated is not None
        if not self.has_training_data:
            # Tasks learn columns and labels from the training data: here from what is evaluated.
            self.train_file = evaluated
            self.validation_file = evaluated
        if self.is_given:
            super().__post_init__()
