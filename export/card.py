"""The model card: what a folder holds, how it was made, what was measured and how to run it, for people and the Hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from prunelle.compression.record import RECORD_NAME, read_record, without_folders
from prunelle.compression.shapes import needs_shaped_class
from prunelle.compression.sparse import SPARSE_NAME
from prunelle.export.checkpoint import HEADS
from prunelle.export.files import published_when_done
from prunelle.export.report import Report, markdown_table
from prunelle.export.variants import VARIANTS
from prunelle.tasks.arguments import BUILTIN_PREFIX

CARD_NAME = "README.md"

# By task: the Hub's and the pipelines' name of it, and what to ask in Python and in JavaScript.
PIPELINES = {
    "text-classification": ("text-classification", '"A lovely, warm film."', '"A lovely, warm film."'),
    "token-classification": ("token-classification", '"Ada was born in London."', '"Ada was born in London."'),
    "question-answering": (
        "question-answering",
        'question="Who came?", context="Ada came."',
        '"Who came?", "Ada came."',
    ),
    "masked-lm": ("fill-mask", 'f"It was {run.tokenizer.mask_token}."', "`It was ${run.tokenizer.mask_token}.`"),
    "causal-lm": ("text-generation", '"Once upon a time"', '"Once upon a time"'),
    "sequence-to-sequence": ("text2text-generation", '"Once upon a time"', '"Once upon a time"'),
}
PAIR = ("A man sleeps.", "Nobody is awake.")
WITHOUT_PIPELINE = ("question-answering", "sequence-to-sequence")  # in transformers 5
WITHOUT_CLIENTS = ("causal-lm",)  # whose clients want a file with a cache

# What transformers.js calls the files, the one to show first.
DTYPES = {"int8-dynamic": "q8", "int8-static": "int8", "fp32": "fp32", "fp16": "fp16", "int4": "q4"}

METRICS = ("accuracy", "precision", "recall", "f1", "exact_match", "rougeL", "loss")

METHODS = {
    "finetune": "fine-tuned on labels",
    "distill": "distilled from a teacher",
    "mutual": "trained beside peers that learned from one another",
    "prune": "pruned",
    "quantize": "trained with the rounding of int8",
    "export": "exported to ONNX",
}


def write_card(folder: Path, report: Report | None = None, model_id: str | None = None) -> None:
    """Write `README.md` into an output folder, from its configuration, `compression.json` and what was measured.

    Args:
        folder: holds `config.json`, and whatever else is to be spoken of.
        report: the closing table, where there is one.
        model_id: what to load the model by, as a rule its name on the Hub; the folder's name by default.
    """
    card = Card(folder, report, model_id or folder.name)
    with published_when_done(folder / CARD_NAME) as unfinished:
        unfinished.write_text(card.text(), encoding="utf-8")


class Card:
    """What is said of one folder; see `write_card`."""

    def __init__(self, folder: Path, report: Report | None, model_id: str) -> None:
        self.folder, self.report, self.model_id = folder, report, model_id
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.record = read_record(folder) or {}
        self.recipe: dict[str, Any] = self.record.get("recipe", {})
        (self.architecture,) = self.config["architectures"]
        self.auto_class: str
        self.auto_class, self.task = next(
            ((auto.__name__, task) for ending, (auto, task) in HEADS.items() if self.architecture.endswith(ending)),
            ("AutoModelForSeq2SeqLM", "sequence-to-sequence"),
        )
        self.pipeline, self.python, self.javascript = PIPELINES[self.task]
        self.reads_pairs = self.recipe.get("text_pair_column_name") is not None
        if self.reads_pairs:
            self.python = json.dumps(dict(zip(("text", "text_pair"), PAIR, strict=True)))
        self.has_weights = any(folder.glob("*.safetensors"))
        self.files = [name for name in DTYPES if (folder / VARIANTS[name].file).is_file()]

    def text(self) -> str:
        """The card, its metadata before it."""
        sections = [
            f"---\n{self.metadata().to_yaml()}\n---",
            f"# {self.model_id.split('/')[-1]}",
            self._about(),
            *self._measured(),
            "## How it was made",
            f"What `{RECORD_NAME}` says in full, with versions and logs:",
            _code("yaml", yaml.safe_dump(without_folders(self.recipe), sort_keys=False, allow_unicode=True)),
            "## How to run it",
            *self._clients(),
        ]
        return "\n\n".join(sections) + "\n"

    def metadata(self) -> ModelCardData:
        """What the Hub files the model under."""
        metrics = self._metrics()
        data = self._data_name()
        results = [
            EvalResult(self.pipeline, dataset_type=data, dataset_name=data, metric_type=name, metric_value=value)
            for name, value in metrics.items()
        ]
        dataset = self.recipe.get("dataset_name")
        return ModelCardData(
            model_name=self.model_id.split("/")[-1],
            base_model=base_models(self.recipe) or None,
            datasets=[dataset] if dataset and _is_on_the_hub(dataset) else None,
            metrics=[name for name in metrics if name != "loss"] or None,
            eval_results=results or None,
            pipeline_tag=self.pipeline,
            library_name="transformers" if self.has_weights else "transformers.js",
            tags=["prunelle", *(["onnx"] if self.files else []), *self.record.get("methods", [])],
        )

    def _metrics(self) -> Mapping[str, float]:
        if self.report is None:
            logged = self.record.get("metrics", {})
            return {name: logged[f"eval_{name}"] for name in METRICS if f"eval_{name}" in logged}
        (row,) = (row for row in self.report.models if row.name == self.report.reference)
        return row.metrics

    def _data_name(self) -> str:
        named = (self.recipe.get(name) for name in ("test_file", "validation_file", "dataset_name", "train_file"))
        given = next((str(name) for name in named if name), "text")
        return given if _is_on_the_hub(given) or given.startswith(BUILTIN_PREFIX) else Path(given).name

    def _about(self) -> str:
        done = [METHODS.get(method, method) for method in self.record.get("methods", [])]
        base = [f"[{name}](https://huggingface.co/{name})" for name in base_models(self.recipe)]
        said = f"A `{self.architecture}`"
        if done:
            said += f", {' and '.join(done)}"
        if base:
            said += f"; at the beginning stood {' and '.join(base)}"
        if density := self.record.get("density"):
            said += f". Of its pruned weights {min(density.values()):.1%} to {max(density.values()):.1%} are kept"
        return f"{said}. Made with Prunelle {self.record.get('versions', {}).get('prunelle', '')}".rstrip() + "."

    def _measured(self) -> Iterator[str]:
        if self.report is None:
            return
        yield "## What was measured"
        yield f"On `{self._data_name()}`:"
        yield markdown_table(self.report.cells())
        yield self.report.legend()
        yield from (f"> **Warning:** {text}" for text in self.report.warnings)

    def _clients(self) -> Iterator[str]:
        if self.has_weights:
            yield "With transformers:"
            yield _code("python", self._transformers())
        if not self.files:
            return
        file = VARIANTS[self.files[0]].file
        yield f"`{file.as_posix()}` with onnxruntime (1.23 or later, unless exported to an older opset) alone:"
        yield _code("python", self._onnxruntime(file))
        if self.task in WITHOUT_CLIENTS:
            return
        yield "With optimum:"
        yield _code("python", self._optimum(file))
        if self.reads_pairs:  # which the pipeline of transformers.js does not
            return
        yield "With transformers.js:"
        yield _code("js", self._transformers_js())

    def _transformers(self) -> str:
        loads = f'{self.auto_class}.from_pretrained("{self.model_id}")'
        imports = [f"from transformers import {self.auto_class}, AutoTokenizer, pipeline"]
        if needs_shaped_class(self.config) or (self.folder / SPARSE_NAME).is_file():  # no stock class can load these
            loads = f'prunelle.from_pretrained("{self.model_id}")'
            imports = ["import prunelle", "from transformers import AutoTokenizer, pipeline"]
        lines = [f"model = {loads}", f'tokenizer = AutoTokenizer.from_pretrained("{self.model_id}")']
        if self.task == "question-answering":
            lines += [
                'inputs = tokenizer("Who came?", "Ada came.", return_tensors="pt")',
                "outputs = model(**inputs)",
                "start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
                'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
            ]
        elif self.task == "sequence-to-sequence":
            lines += [
                f'ids = model.generate(**tokenizer({self.python}, return_tensors="pt"))',
                "print(tokenizer.decode(ids[0], skip_special_tokens=True))",
            ]
        else:
            lines += [
                f'run = pipeline("{self.pipeline}", model=model, tokenizer=tokenizer)',
                f"print(run({self.python}))",
            ]
        if self.task in WITHOUT_PIPELINE:
            imports = [line.removesuffix(", pipeline") for line in imports]
        return "\n".join([*imports, "", *lines])

    def _onnxruntime(self, file: Path) -> str:
        asked = '"Who came?", "Ada came."' if self.task == "question-answering" else '"A lovely, warm film."'
        if self.reads_pairs:
            asked = ", ".join(map(json.dumps, PAIR))
        return "\n".join(
            [
                "import numpy as np",
                "import onnxruntime",
                "from tokenizers import Tokenizer",
                "",
                f'encoding = Tokenizer.from_file("{self.model_id}/tokenizer.json").encode({asked})',
                f'session = onnxruntime.InferenceSession("{self.model_id}/{file.as_posix()}")',
                "inputs = {",
                '    "input_ids": encoding.ids,',
                '    "attention_mask": encoding.attention_mask,',
                '    "token_type_ids": encoding.type_ids,',
                "}",
                "names = [tensor.name for tensor in session.get_inputs()]",
                "print(session.run(None, {name: np.array([inputs[name]]) for name in names}))",
            ]
        )

    def _optimum(self, file: Path) -> str:
        ort_class = self.auto_class.replace("AutoModel", "ORTModel")
        return "\n".join(
            [
                f"from optimum.onnxruntime import {ort_class}",
                "from transformers import AutoTokenizer, pipeline",
                "",
                f'name = "{self.model_id}"',
                f'model = {ort_class}.from_pretrained(name, subfolder="{file.parent}", file_name="{file.name}")',
                f'run = pipeline("{self.pipeline}", model=model, tokenizer=AutoTokenizer.from_pretrained(name))',
                f"print(run({self.python}))",
            ]
        )

    def _transformers_js(self) -> str:
        options = f'{{ dtype: "{DTYPES[self.files[0]]}" }}'
        return "\n".join(
            [
                'import { pipeline } from "@huggingface/transformers";',
                "",
                f'const run = await pipeline("{self.pipeline}", "{self.model_id}", {options});',
                f"console.log(await run({self.javascript}));",
            ]
        )


def base_models(recipe: Mapping[str, Any]) -> list[str]:
    """The models of the Hub that stood at the beginning, through however many runs on this machine.

    Args:
        recipe: the flags of the last run. A local folder that it names is asked for its own record.
    """
    flags = ("student_name_or_path", "model_name_or_path", "teacher_name_or_path")
    given: str | list[str] = next((recipe[flag] for flag in flags if recipe.get(flag)), [])
    found = []
    for name in [given] if isinstance(given, str) else given:
        if Path(name).exists():
            found += base_models((read_record(Path(name)) or {}).get("recipe", {}))
        elif _is_on_the_hub(name):
            found.append(name)
    return found


def _is_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).suffix and not Path(name).exists()


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
