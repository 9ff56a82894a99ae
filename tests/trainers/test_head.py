"""Logits in chunks: what all of them at once would give, and never all of them at once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from prunelle.losses import (
    DecoupledLoss,
    HardLabelLoss,
    JensenShannonLoss,
    LogitMSELoss,
    ReverseKLLoss,
    SoftTargetLoss,
    TopKTargetLoss,
    top_k_distribution,
)
from prunelle.trainers import DistillationArguments, head
from prunelle.trainers.head import find_head
from prunelle.trainers.objective import Objective, build_objective
from prunelle.trainers.terms import Batch

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
CONFIGS = {
    "tied, with a bias": BertConfig(**SIZES),
    "a head in the model's own forward": DistilBertConfig(
        vocab_size=53, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=16
    ),
    "RoBERTa's": RobertaConfig(**SIZES),
    "ModernBERT's": ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    "causal, tied": GPT2Config(vocab_size=53, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1),
    "causal, untied, without a bias": LlamaConfig(**SIZES, tie_word_embeddings=False),
}


def language_model(config: Any, seed: int = 0) -> PreTrainedModel:
    set_seed(seed)
    causal = config.model_type in ("gpt2", "llama", "gemma2")
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases that are not 0
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch() -> dict[str, Tensor]:
    """Four rows of 7 tokens, of uneven length; a third of them are asked for."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(5, 53, (4, 7), generator=draw)
    mask = torch.arange(7) < torch.tensor([7, 4, 6, 5]).unsqueeze(1)
    asked = mask & (torch.rand(4, 7, generator=draw) < 0.4)
    return {"input_ids": words * mask, "attention_mask": mask.long(), "labels": torch.where(asked, words, -100)}


def naive(student: PreTrainedModel, teacher: PreTrainedModel, arguments: DistillationArguments) -> Tensor:
    """All logits of both, then what is looked at of them: the published training script's way."""
    inputs = batch()
    labels, mask = inputs.pop("labels"), inputs["attention_mask"].bool()
    ours = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True)
    chosen = mask if arguments.distilled_positions == "all" else labels != -100
    s, t = ours.logits[chosen], theirs.logits[chosen]
    soft = {
        "forward_kl": lambda: SoftTargetLoss()(s, t),
        "reverse_kl": lambda: ReverseKLLoss()(s, t),
        "jensen_shannon": lambda: JensenShannonLoss()(s, t),
        "mse": lambda: LogitMSELoss()(s, t),
        "decoupled": lambda: DecoupledLoss()(s, t, labels[chosen]),
        "top_k": lambda: TopKTargetLoss()(s, *top_k_distribution(t, arguments.soft_target_top_k)),
    }[arguments.soft_target_loss]()
    hard = HardLabelLoss()(ours.logits.flatten(0, 1), labels.flatten())
    h, g = ours.hidden_states[-1][mask], theirs.hidden_states[-1][mask]
    return 5 * soft + 2 * hard + (1 - torch.cosine_similarity(h, g, dim=-1)).mean()


def split(objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel) -> Tensor:
    """The objective's way, without the trainer."""
    inputs = batch()
    asked = Batch(inputs.pop("labels"), inputs["attention_mask"])
    positions = objective.positions(asked)
    with torch.no_grad():
        said = objective.ask(teacher, inputs, positions)
    return objective(student, inputs, said, asked, positions, objective.count(asked), whole_logits=False)[0]


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class LargestLogits(TorchDispatchMode):
    """The most numbers in a tensor over the vocabulary, weights and their gradients aside."""

    found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == 53 and tensor.shape[0] != 16:
                self.found = max(self.found, tensor.numel())
        return result


@pytest.fixture
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows."""
    monkeypatch.setitem(head.CHUNK, "cpu", 3 * 53 + 1)


def check_against_naive(student: PreTrainedModel, teacher: PreTrainedModel, arguments: DistillationArguments) -> None:
    expected = naive(student, teacher, arguments)
    slopes = gradients(student, expected)
    objective = build_objective(student, teacher, arguments)
    with LargestLogits() as largest:
        loss = split(objective, student, teacher)
        found = gradients(student, 0.5 * loss)  # what comes from above counts
    assert largest.found == 3 * 53
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        # The absolute part is for biases of keys, whose gradient is 0 but for rounding.
        error = torch.linalg.vector_norm(2 * found[name] - slope)
        assert error < 1e-4 * torch.linalg.vector_norm(slope) + 1e-6, name


@pytest.mark.usefixtures("three_rows")
@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_chunks_give_the_naive_loss_and_gradients(tmp_path: Path, config: Any, positions: Any) -> None:
    """Prevents gradients that miss a chunk, a bias or the tied half of the embeddings, and logits all at once."""
    arguments = DistillationArguments(str(tmp_path), distilled_positions=positions)
    check_against_naive(language_model(config), language_model(config, seed=1), arguments)


@pytest.mark.usefixtures("three_rows")
@pytest.mark.parametrize("loss", ["reverse_kl", "jensen_shannon", "mse", "decoupled", "top_k"])
def test_every_loss_on_logits_goes_by_chunks(tmp_path: Path, loss: Any) -> None:
    """Prevents a loss whose chunks are each divided by their own rows."""
    arguments = DistillationArguments(str(tmp_path), soft_target_loss=loss, soft_target_top_k=4)
    student, teacher = (language_model(BertConfig(**SIZES), seed) for seed in (0, 1))
    check_against_naive(student, teacher, arguments)


def test_a_batch_that_asks_nothing_has_a_gradient_of_zero(tmp_path: Path) -> None:
    """Prevents NaN, and a process that waits for the gradients of another whose batch has no masked token."""
    student, teacher = (language_model(CONFIGS["causal, untied, without a bias"], seed) for seed in (0, 1))
    objective = build_objective(student, teacher, DistillationArguments(str(tmp_path), hidden_cosine_weight=0.0))
    inputs = batch()
    asked = Batch(torch.full_like(inputs.pop("labels"), -100), inputs["attention_mask"])
    positions = torch.empty(0, dtype=torch.int64)
    said = objective.ask(teacher, inputs, positions)
    loss, terms, _ = objective(student, inputs, said, asked, positions, objective.count(asked), whole_logits=False)
    assert loss.item() == 0
    assert all(term.item() == 0 for term in terms.values())
    slopes = gradients(student, loss)
    assert slopes.keys() == dict(student.named_parameters()).keys()
    assert not any(slope.any() for slope in slopes.values())


def test_under_autocast_chunks_are_computed_as_the_model_is(tmp_path: Path) -> None:
    """Prevents a head that runs in float32 while the layers run in bfloat16, and sums of gradients that lose digits."""
    student, teacher = (language_model(BertConfig(**SIZES), seed) for seed in (0, 1))
    arguments = DistillationArguments(str(tmp_path))
    exact = gradients(student, naive(student, teacher, arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = naive(student, teacher, arguments)
        loss = split(build_objective(student, teacher, arguments), student, teacher)
    slopes, found = gradients(student, expected), gradients(student, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, slope in exact.items():
        distance = torch.linalg.vector_norm(found[name] - slope)
        assert distance < 1.5 * torch.linalg.vector_norm(slopes[name] - slope) + 1e-6, name


def test_float16_keeps_the_slopes_of_one_item_among_many() -> None:
    """Prevents an accumulated batch's gradients from being rounded to 0 before the scaler can raise them."""
    torch.manual_seed(0)
    decoder, states, items = torch.nn.Linear(16, 500), torch.randn(32, 16), 32 * 1024
    labels = torch.randint(500, (32,))

    def found(dtype: torch.dtype) -> list[Tensor]:
        inputs = states.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = head.summed_over_chunks(
                inputs, decoder, lambda logits, rows: HardLabelLoss()(logits, labels[rows], items)
            )
        return [*torch.autograd.grad(65536 * loss, [inputs, *decoder.parameters()])]

    for rounded, exact in zip(found(torch.float16), found(torch.float32), strict=True):
        assert (rounded - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_logits_as_large_as_training_makes_them_are_chunked_too(seed: int, dtype: torch.dtype) -> None:
    """Prevents the rounding of a trained model's logits from being taken for a head that does more than decode."""
    model = language_model(BertConfig(**SIZES | {"vocab_size": 3000, "hidden_size": 384}), seed).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    assert find_head(model) is not None


def test_logits_that_are_more_than_the_decoders_output_are_left_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents capped, scaled or shifted logits from being distilled as if they were not, and a silent cost."""
    capped = language_model(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0))
    assert find_head(capped) is None
    assert "Gemma2ForCausalLM makes more of its logits" in caplog.text
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=53, d_model=16, d_kv=8, d_ff=24, num_layers=1))
    assert find_head(encoder_decoder) is None
    student, teacher = capped, language_model(Gemma2Config(**capped.config.to_dict()), seed=1)
    arguments = DistillationArguments(str(tmp_path))
    expected = naive(student, teacher, arguments)
    slopes = gradients(student, expected)
    loss = split(build_objective(student, teacher, arguments), student, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, slope in gradients(student, loss).items():
        torch.testing.assert_close(slope, slopes[name], rtol=1e-4, atol=1e-5)


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    """Prevents a replaced decoder or a hook from being saved, exported, or left behind by an error."""
    model = BertForMaskedLM(BertConfig(**SIZES))
    found = find_head(model)
    assert found is not None

    def fail(states: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), found.taken_over(torch.tensor([0]), fail):
        model(input_ids=torch.tensor([[5, 6]]))
    assert model.training
    assert "forward" not in vars(found.decoder)
    assert not model.bert._forward_hooks
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 53)


SHARDED = """
import torch
from types import SimpleNamespace
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from test_head import CONFIGS, batch, language_model
from prunelle.trainers import DistillationArguments
from prunelle.trainers.distillation import prepare_teacher
from prunelle.trainers.objective import build_objective
from prunelle.trainers.terms import batch_of

torch.distributed.init_process_group("gloo")
torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
accelerator = SimpleNamespace(
    is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=torch.device("cpu")
)
inputs = batch()
asked = batch_of(inputs)
features = {name: inputs[name] for name in ("input_ids", "attention_mask")}
for inside, config in ((0.0, CONFIGS["causal, tied"]), (1.0, CONFIGS["causal, untied, without a bias"])):
    arguments = DistillationArguments("unused", hidden_cosine_weight=inside)
    student, teacher = (language_model(config, seed) for seed in (0, 1))
    objective = build_objective(student, teacher, arguments)
    assert objective.teacher_head is not None
    positions = objective.positions(asked)

    def loss():
        said = objective.ask(teacher, features, positions)
        return objective(student, features, said, asked, positions, objective.count(asked), False)[0]

    expected = loss()
    teacher.requires_grad_(False)
    teacher = prepare_teacher(accelerator, teacher)
    assert isinstance(teacher, FSDPModule)
    assert all(parameter.device_mesh.size() == 2 for parameter in teacher.parameters())
    for _ in range(2):
        found = loss()
        torch.testing.assert_close(found, expected)
    found.backward()
"""


def test_a_sharded_teacher_says_what_a_whole_one_does(tmp_path: Path) -> None:
    """Prevents FSDP2 from freeing the weights of a head before its logits are computed, chunk by chunk."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, tmp_path / "sharded.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
