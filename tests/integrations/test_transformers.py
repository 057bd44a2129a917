"""Hugging Face transformers: tiny models of random weights, as they are trained, adapted and read.

Letters: N sequences, L positions, D features, C classes or tokens of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import textbook
import torch
from torch import Tensor, nn
from torch.nn import functional

import flatcore

N, L, C = 6, 7, 50
# about itself: names that will go, options that a tiny configuration leaves out
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(transformers: ModuleType, **options: Any) -> nn.Module:
    config = transformers.BertConfig(vocab_size=C, max_position_embeddings=16, **(SIZES | {"num_labels": 3} | options))
    return transformers.BertForSequenceClassification(config)


def llama(transformers: ModuleType, kind: str = "LlamaForCausalLM", **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=C, max_position_embeddings=16, num_key_value_heads=2, pad_token_id=0, **(SIZES | options)
    )
    return getattr(transformers, kind)(config)


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(1, C, (N, L))
    mask = torch.ones_like(ids)
    ids[0, -2:], mask[0, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def body_output(model: nn.Module, head: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """What goes into the head, by a hook of this test's own."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**inputs, **options)
    handle.remove()
    return seen[0]


def check(
    got: Tensor, features: Tensor, head: nn.Linear, target: Tensor | None = None, measure: str = "layerwise"
) -> None:
    bias = None if head.bias is None else head.bias.detach()
    want = textbook.mean(measure, features, head.weight.detach(), bias, target)
    torch.testing.assert_close(got.detach().double(), want, rtol=textbook.FLOAT32, atol=0.0)


def test_a_classifier_and_its_training_step(transformers: ModuleType) -> None:
    model, inputs = bert(transformers).eval(), tokens()
    features = body_output(model, model.classifier, inputs)
    labels = torch.arange(N) % 3
    with flatcore.Probe(model) as probe:
        output = model(**inputs, labels=labels)
        check(probe.relative_flatness(), features, model.classifier)
        assert probe.head_name == "classifier"
        (output.loss + 0.01 * probe.relative_flatness(labels, log=True)).backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(**inputs, return_dict=False)
        check(probe.relative_flatness(), features, model.classifier)


@pytest.mark.parametrize("tied", (False, True), ids=("", "tied"))
def test_a_language_model_with_padding(transformers: ModuleType, tied: bool) -> None:
    model, inputs = llama(transformers, tie_word_embeddings=tied).eval(), tokens()
    features = body_output(model, model.lm_head, inputs)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    shifted = torch.cat([labels[:, 1:], torch.full((N, 1), -100)], dim=1)
    with flatcore.Probe(model) as probe:
        model(**inputs, labels=labels)
        got = probe.relative_flatness(shifted)
        check(got, features, model.lm_head, shifted)
        got.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(**inputs, logits_to_keep=1)
        check(probe.relative_flatness(), features[:, -1:], model.lm_head)


# pytorch#81296: the recomputation runs the hooks of the layers inside the block
@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_gradient_checkpointing(transformers: ModuleType, reentrant: bool) -> None:
    model, inputs = llama(transformers), tokens()
    features = body_output(model, model.lm_head, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    with flatcore.Probe(model) as probe:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        check(probe.relative_flatness(), features, model.lm_head)
        loss.backward()
        check(probe.relative_flatness(), features, model.lm_head)
        assert probe.head_name == "lm_head"
        model.zero_grad()
        model(**inputs)
        probe.relative_flatness(log=True).backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        check(probe.relative_flatness(), features, model.lm_head)


def test_generation_leaves_its_last_pass(transformers: ModuleType) -> None:
    model, inputs = llama(transformers).eval(), tokens()
    prompt = {name: x[1:2] for name, x in inputs.items()}
    with torch.no_grad(), flatcore.Probe(model) as probe:
        out = model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
        got = probe.hessian_trace()
    features = body_output(model, model.lm_head, {"input_ids": out[:, :-1]})[:, -1:]
    check(got, features, model.lm_head, measure="hessian_trace")


def test_a_token_selected_after_the_head_is_refused(transformers: ModuleType) -> None:
    model, inputs = llama(transformers, "LlamaForSequenceClassification", num_labels=3).eval(), tokens()
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(**inputs)
        with pytest.raises(RuntimeError, match=r"(?s)not the same samples|select") as refused:
            probe.relative_flatness()
        assert "probe.features" in str(refused.value) or "linear_weight" in str(refused.value), "no way out"
    with pytest.raises(RuntimeError, match=r"(?s)not the same samples|select"):
        flatcore.evaluate(model, [inputs | {"labels": torch.arange(N) % 3}])


def test_a_softcap_is_refused(transformers: ModuleType) -> None:
    config = transformers.Gemma2Config(
        vocab_size=C, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.2, **SIZES
    )
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(**tokens())
        with pytest.raises(RuntimeError, match=r"softcap"):
            probe.relative_flatness()


def test_a_scaled_head_names_its_temperature(transformers: ModuleType) -> None:
    config = transformers.CohereConfig(
        vocab_size=C, num_key_value_heads=2, logit_scale=0.25, max_position_embeddings=16, pad_token_id=0, **SIZES
    )
    model, inputs = transformers.CohereForCausalLM(config).eval(), tokens()
    features = body_output(model, model.lm_head, inputs)
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(**inputs)
        with pytest.raises(RuntimeError, match=r"divided by 4:.*temperature"):
            probe.relative_flatness()
    with torch.no_grad(), flatcore.Probe(model, temperature=4.0) as probe:
        model(**inputs)
        want = textbook.mean("layerwise", features, model.lm_head.weight, temperature=4.0)
        torch.testing.assert_close(probe.relative_flatness().double(), want, rtol=textbook.FLOAT32, atol=0.0)


def test_a_head_of_one_output_says_so(transformers: ModuleType) -> None:
    model, inputs = bert(transformers, num_labels=1).eval(), tokens()
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(**inputs)
        with pytest.raises((ValueError, RuntimeError, UserWarning), match=r"one output"):
            probe.relative_flatness()


@pytest.mark.parametrize("kind", ("dict", "BatchEncoding"))
def test_evaluate_takes_what_a_collator_gives(transformers: ModuleType, kind: str) -> None:
    model, inputs = bert(transformers), tokens()
    labels = torch.arange(N) % 3
    features = body_output(model.eval(), model.classifier, inputs)
    batch: Any = {name: x for name, x in (inputs | {"labels": labels}).items()}
    if kind == "BatchEncoding":
        batch = transformers.BatchEncoding(batch)
    report = flatcore.evaluate(model, [batch])
    assert report.groups["all"].rows == N
    want = textbook.mean("layerwise", features, model.classifier.weight, model.classifier.bias)
    assert report["layerwise"].mean == pytest.approx(float(want), rel=textbook.FLOAT32)


def test_evaluate_a_language_model_on_mappings(transformers: ModuleType) -> None:
    """The labels of a causal model are its inputs, which it shifts itself: unshifted, row k would be judged by token k."""
    model, inputs = llama(transformers).eval(), tokens()
    features = body_output(model, model.lm_head, inputs)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    with pytest.raises(ValueError, match=r"labels equal to input_ids.*shift them"):
        flatcore.evaluate(model, [inputs | {"labels": labels}])
    shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)  # in the error's words
    for batch in (inputs | {"labels": shifted}, (inputs, shifted)):
        report = flatcore.evaluate(model, [batch])
        assert report.groups["all"].rows == int((shifted != -100).sum())
        want = textbook.mean("layerwise", features, model.lm_head.weight, None, shifted)
        assert report["layerwise"].mean == pytest.approx(float(want), rel=textbook.FLOAT32)


def test_a_trainer_with_a_regulariser(transformers: ModuleType, accelerate: ModuleType, tmp_path: Path) -> None:
    """Checkpointing, accumulation and accelerate's wrappers at once, as Trainer has them; then its loader into evaluate."""
    model, inputs = bert(transformers), tokens()
    labels = torch.arange(N) % 3
    rows = [{name: x[k] for name, x in inputs.items()} | {"labels": labels[k]} for k in range(N)]
    found: list[tuple[Tensor, Tensor]] = []

    class Regularised(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
            output = model(**inputs)
            value = probe.relative_flatness(inputs["labels"])
            weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
            found.append((value.detach(), textbook.mean("layerwise", probe.features.detach(), weight, bias)))
            loss = output["loss"] + 0.01 * value.log1p()
            return (loss, output) if return_outputs else loss

    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", num_train_epochs=2,
        per_device_train_batch_size=2, per_device_eval_batch_size=4, gradient_accumulation_steps=2, bf16=True,
        gradient_checkpointing=True, logging_strategy="no",
    )  # fmt: skip
    head = model.classifier
    trainer = Regularised(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    with flatcore.Probe(model) as probe:
        trainer.train()
        assert probe.head is head
    assert len(found) == 6
    for got, want in found:
        torch.testing.assert_close(got.double(), want, rtol=textbook.FLOAT32, atol=0.0)
    report = flatcore.evaluate(trainer.model, trainer.get_eval_dataloader())
    features = body_output(model.eval(), head, inputs)
    want = float(textbook.mean("layerwise", features, head.weight.detach(), head.bias.detach()))
    assert report.groups["all"].rows == N
    assert report["layerwise"].mean == pytest.approx(want, rel=textbook.FLOAT32)


def test_lora_on_every_layer_of_a_language_model(transformers: ModuleType, peft: ModuleType) -> None:
    model, inputs = llama(transformers), tokens()
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    features = body_output(model, model.base_model.model.lm_head, inputs)
    with flatcore.Probe(model) as probe:
        model(**inputs)
        check(probe.relative_flatness(), features, model.base_model.model.lm_head)
        probe.relative_flatness(log=True).backward()
    grads = [p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in model.named_parameters() if "lora_" in n]
    assert all(grads)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_model_in_half_precision(transformers: ModuleType, dtype: torch.dtype) -> None:
    model, inputs = llama(transformers).to(dtype).eval(), tokens()
    features = body_output(model, model.lm_head, inputs)
    with torch.no_grad(), flatcore.Probe(model) as probe:
        model(**inputs)
        check(probe.relative_flatness(), features, model.lm_head)
