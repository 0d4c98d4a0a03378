"""Generated text against a plain loop over the model's logits; seeds, batches, and what is refused."""

import functools
import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.unit.trainer.runs import CONFIGS, VOCAB, fresh_model, write_run
from zeropipe.data_prep.errors import UserError
from zeropipe.launcher.cli import main
from zeropipe.trainer.evaluation.generation import Sampling, generate

SMALL = {**CONFIGS["gpt2"], "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {**CONFIGS["llama"], "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
PROMPTS = ["import os\nimport sys\n", "def", "class Error(Exception):"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    """Random weights, and an end-of-text token that never wins, whatever the tokenizer of this Python's library is."""
    model = fresh_model({"gpt2": SMALL, "llama": LLAMA}[request.param], seed=3)
    model.forward = with_logit(model.forward, 0, -1e4)
    return model


def with_logit(forward, token: int, value: float):
    @functools.wraps(forward)  # `generate` passes what it finds in the signature
    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., token] = value
        return output

    return changed


@pytest.fixture(scope="module")
def tokenizer(text_store):
    return AutoTokenizer.from_pretrained(text_store / "tokenizer")


def plain_greedy(model, tokenizer, prompt: str, count: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            following = model(input_ids=ids).logits[0, -1].argmax()
        ids = torch.cat([ids, following[None, None]], 1)
    return tokenizer.decode(ids[0, start:].tolist())


def texts(model, tokenizer, prompts=PROMPTS, **sampling) -> list[str]:
    return [result.text for result in generate(model, tokenizer, prompts, Sampling(max_new_tokens=12, **sampling))]


def test_greedy_is_the_likeliest_token_each_time_and_a_batch_is_its_prompts_alone(model, tokenizer):
    expected = [plain_greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert len(set(expected)) == 3
    assert texts(model, tokenizer) == expected


def test_the_seed_decides_what_is_drawn(model, tokenizer):
    one = texts(model, tokenizer, temperature=1.0, seed=1)
    torch.rand(10)  # nothing outside may matter
    assert texts(model, tokenizer, temperature=1.0, seed=1) == one
    assert texts(model, tokenizer, temperature=1.0, seed=2) != one


def test_the_narrowest_draws_are_greedy(model, tokenizer):
    greedy = texts(model, tokenizer)
    assert texts(model, tokenizer, temperature=2.0, top_k=1) == greedy
    assert texts(model, tokenizer, temperature=2.0, top_p=1e-6) == greedy
    assert texts(model, tokenizer, temperature=1e-4) == greedy


def test_top_k_draws_among_the_likeliest(model, tokenizer):
    with torch.no_grad():
        ids = tokenizer("def", return_tensors="pt")["input_ids"]
        likeliest = set(model(input_ids=ids).logits[0, -1].topk(3).indices.tolist())
    drawn = set()
    for seed in range(30):
        (result,) = generate(model, tokenizer, ["def"], Sampling(5.0, top_k=3, seed=seed, max_new_tokens=1))
        drawn.add(result.text)
    assert drawn == {tokenizer.decode([token], skip_special_tokens=True) for token in likeliest}


def test_generation_ends_at_the_end_of_text(model, tokenizer, monkeypatch):
    (result,) = generate(model, tokenizer, ["def"], Sampling(max_new_tokens=12))
    stop = tokenizer(PROMPTS[0])["input_ids"][0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
    monkeypatch.setattr(model, "forward", with_logit(model.forward, stop, 1e4))
    (ended,) = generate(model, tokenizer, ["def"], Sampling(max_new_tokens=12))
    assert not result.ended and result.tokens == 12
    assert ended.ended and ended.tokens == 0 and ended.text == ""


def test_no_room_for_new_tokens(model, tokenizer):
    with pytest.raises(UserError, match=r"context of 64; shorten the prompt or ask for at most \d+ new tokens"):
        generate(model, tokenizer, ["x " * 30], Sampling(max_new_tokens=50))


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"top_k": 5}, "add --temperature"),
    ],
)
def test_settings_that_make_no_sense(settings, option):
    with pytest.raises(UserError, match=option):
        Sampling(**settings)


@pytest.mark.distributed
def test_from_a_run_by_the_command_line(gpt2_run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("import os\n\nclass A:\n")
    words = ["generate", str(gpt2_run), "--prompt", "def", "--prompt-file", str(tmp_path / "prompts.txt")]
    assert main([*words, "--max-new-tokens", "5", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["prompt"] for result in results] == ["def", "import os", "class A:"]
    assert all(result["tokens"] == 5 or result["ended"] for result in results)
    assert main([*words, "--max-new-tokens", "5"]) == 0
    assert all(result["prompt"] + result["text"] in capsys.readouterr().out for result in results[:1])


def test_no_prompt_and_no_tokenizer(text_store, tmp_path, capsys):
    run = write_run(tmp_path / "run", text_store, fresh_model(SMALL), SMALL)
    assert main(["generate", str(run)]) == 2
    assert "--prompt" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt-file", str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err
    fresh_model(SMALL).save_pretrained(tmp_path / "bare")
    assert main(["generate", str(tmp_path / "bare"), "--prompt", "x"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", "x"]) == 2
    assert "nothing" in capsys.readouterr().err
