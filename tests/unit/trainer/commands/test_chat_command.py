"""`zeropipe chat` and `generate --chat` from the outside: pipes, a terminal, adapters, and what is refused."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.trainer.chatting import CHATML, CONTEXT, DIALOGUES, SYSTEM, lines_of_json
from tests.unit.trainer.runs import CONFIGS, VOCAB, fresh_model, write_run
from zeropipe.launcher.cli import main
from zeropipe.trainer.commands import chat as chat_command

QUESTION, ANSWER, SECOND, SECOND_ANSWER = DIALOGUES[0]
COMMAND = [sys.executable, "-m", "zeropipe.launcher", "chat"]


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs the verb on what stands in standard input; returns the exit code, stdout and stderr."""

    def run(stdin, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(["chat", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_real_pipe(learned):
    done = subprocess.run(
        [*COMMAND, str(learned)], input=f"{QUESTION}\n\n{SECOND}\n", capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n{SECOND_ANSWER}\n"), done.stderr
    assert done.stderr == ""


def test_a_real_terminal(learned, tmp_path):
    """An answer without an end is stopped by an interrupt, the conversation goes on, and Ctrl-D ends it."""
    folder = Path(shutil.copytree(learned, tmp_path / "long"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 10**6}))
    (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    words = ["--chat-template", str(tmp_path / "endless.jinja"), "--max-new-tokens", "100000"]
    master, slave = pty.openpty()
    child = subprocess.Popen([*COMMAND, str(folder), *words], stdin=slave, stdout=slave, stderr=slave, process_group=0)
    os.close(slave)
    seen = ""

    def until(pattern):
        nonlocal seen
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, seen)):
            assert time.monotonic() < deadline, seen
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096).decode(errors="replace")
        seen = seen[found.end() :]

    try:
        until(r"Ctrl-D ends\][^>]*> ")
        os.write(master, b"/nothing\n")
        until(r"no command /nothing; there are /reset, /system, /exit[^>]*> ")
        os.write(master, b"What is red?\n")
        until(r"What is red\?\s+\w")
        child.send_signal(signal.SIGINT)
        until(r"\[stopped\]\s+[^>]*> ")
        os.write(master, b"\x04")
        assert child.wait(60) == 0
    finally:
        child.kill()
        os.close(master)


def test_an_interrupt_at_the_prompt_goes_on(monkeypatch, capsys):
    said = iter([KeyboardInterrupt, "hello", KeyboardInterrupt, EOFError])

    def typed(prompt):
        turn = next(said)
        if isinstance(turn, str):
            return turn
        raise turn

    monkeypatch.setattr("builtins.input", typed)
    assert list(chat_command._typed()) == ["hello"]
    assert capsys.readouterr().err == "[Ctrl-D or /exit ends]\n" * 2


def test_commands_and_lines_that_only_look_like_them(learned, chat):
    stdin = (
        f"{QUESTION}\n/reset\n{SECOND}\n/system {SYSTEM}\n {QUESTION}\n/usr/bin is red?\n /reset\n/exit\nnever said\n"
    )
    code, out, err = chat(stdin, learned, "--json", "--max-new-tokens", "20")
    assert code == 0, err
    answers = lines_of_json(out)
    assert [answer["prompt"] for answer in answers] == [QUESTION, SECOND, QUESTION, "/usr/bin is red?", "/reset"]
    told = {key: value for key, value in answers[0].items() if key != "tokens"}
    assert told == {"prompt": QUESTION, "text": ANSWER, "ended": True, "stopped": False, "dropped": 0}


def test_the_system_prompt_of_the_command_is_that_of_the_option(learned, chat, capsys):
    by_option = chat(f"{QUESTION}\n{SECOND}\n", learned, "--system", SYSTEM)
    by_command = chat(f"/system {SYSTEM}\n{QUESTION}\n{SECOND}\n", learned)
    assert by_option == by_command == (0, f"{ANSWER}\n{SECOND_ANSWER}\n", "")
    words = ["generate", str(learned), "--chat", "--prompt", QUESTION, "--prompt", DIALOGUES[1][0], "--system", SYSTEM]
    assert main([*words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["text"] for result in results] == [ANSWER, DIALOGUES[1][1]]
    assert main(words) == 0
    assert f"{QUESTION}\n{ANSWER}\n---" in capsys.readouterr().out


def test_what_ends_a_pipe_names_the_line(learned, chat):
    code, out, err = chat(f"{QUESTION}\n/rest\n{SECOND}\n", learned)
    assert (code, out) == (2, f"{ANSWER}\n")
    assert "line 2 of standard input: no command /rest, did you mean '/reset'?" in err and err.count("\n") == 1
    code, out, err = chat(f"{QUESTION}\n{'word ' * 90}\n", learned)
    assert (code, out) == (2, f"{ANSWER}\n")
    assert "line 2" in err and f"context of {CONTEXT}" in err
    code, _, err = chat(f"{QUESTION}\n", learned, "--max-new-tokens", "0")
    assert code == 2 and "--max-new-tokens 0" in err


def test_notes_say_what_was_dropped_and_cut_off(learned, chat):
    code, _, err = chat(f"{QUESTION}\n" * 6, learned, "--max-new-tokens", "40")
    assert code == 0 and re.search(
        r"\[the context is full: the model no longer sees the oldest \d exchange\(s\)\]", err
    )
    _, _, err = chat(f"{QUESTION}\n", learned, "--max-new-tokens", "3")
    assert err == "[cut off after 3 tokens (--max-new-tokens)]\n"


def test_a_run_needs_a_template_and_takes_one(text_store, tmp_path, chat, capsys):
    config = {**CONFIGS["gpt2"], "vocab_size": VOCAB}
    run = write_run(tmp_path / "run", text_store, fresh_model(config), config)
    code, _, err = chat("hi\n", run)
    assert code == 2 and "no chat template" in err and "--chat-template FILE" in err
    assert main(["generate", str(run), "--chat", "--prompt", "x"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert main(["generate", str(run), "--system", "x", "--prompt", "x"]) == 2
    assert "add --chat" in capsys.readouterr().err
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    code, out, err = chat("hi\nyou\n", run, "--chat-template", tmp_path / "template.jinja", "--max-new-tokens", "5")
    assert code == 0 and out.count("\n") >= 2, err
    code, _, err = chat("hi\n", run, "--chat-template", tmp_path / "none.jinja")
    assert code == 2 and "none.jinja" in err


@pytest.fixture(scope="module")
def adapter(learned, tmp_path_factory):
    """A peft adapter that changes the answers, beside the tokenizer's own base, named by its absolute path."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(learned), config).save_pretrained(str(folder))
    return folder


def test_an_adapter_answers_as_in_plain_peft(learned, adapter, chat):
    from peft import PeftModel

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(learned), str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(learned)
    messages = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = plain.generate(**inputs, do_sample=False, max_new_tokens=15, eos_token_id=[0, 2], pad_token_id=0)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected != ANSWER
    words = (adapter, "--max-new-tokens", "15", "--json")
    for more in ((), ("--base", learned)):
        code, out, err = chat(f"{QUESTION}\n", *words, *more)
        assert code == 0, err
        assert lines_of_json(out)[0]["text"] == expected


def test_an_adapter_without_its_base(learned, adapter, tmp_path, chat):
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))

    def name_base(name):
        config = json.loads((moved / "adapter_config.json").read_text())
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))

    name_base("Somebody/Model-7B")
    code, _, err = chat("hi\n", moved)
    assert code == 2 and "'Somebody/Model-7B' is not a folder here; give its folder with --base" in err
    assert chat("hi\n", moved, "--base", learned)[0] == 0
    code, _, err = chat("hi\n", moved, "--base", tmp_path / "none")
    assert code == 2 and "--base" in err and "none" in err
    name_base(None)
    assert "names no base model" in chat("hi\n", moved)[2]
    (moved / "adapter_config.json").write_text("[")
    assert "cannot be read" in chat("hi\n", moved)[2]
    (moved / "adapter_model.safetensors").rename(moved / "adapter_model.bin")
    assert "pickled adapters are refused" in chat("hi\n", moved)[2]
    code, _, err = chat("hi\n", learned, "--base", learned)
    assert code == 2 and "holds a whole model, which has no base" in err


@pytest.mark.parametrize("change", ["family", "width", "depth"])
def test_an_adapter_of_another_base(learned, adapter, tmp_path, chat, change):
    tokenizer = AutoTokenizer.from_pretrained(learned)
    config = {
        "family": CONFIGS["gpt2"],
        "width": {**CONFIGS["llama"], "hidden_size": 32},
        "depth": {**CONFIGS["llama"], "num_hidden_layers": 1},
    }[change]
    other = tmp_path / "other"
    fresh_model({**config, "vocab_size": len(tokenizer)}).save_pretrained(other)
    tokenizer.save_pretrained(other)
    code, _, err = chat("hi\n", adapter, "--base", other)
    assert code == 2 and err.count("\n") == 1, err
    assert f"{adapter}: this adapter does not fit the base {other}" in err


def test_a_template_in_place_of_the_tokenizers(learned, tmp_path, chat):
    (tmp_path / "two.jinja").write_text(
        CHATML.replace("message['content']", "message['content'].replace('red', 'two')")
    )
    assert chat(f"{QUESTION}\n", learned)[1] == f"{ANSWER}\n"
    assert chat(f"{QUESTION}\n", learned, "--chat-template", tmp_path / "two.jinja")[1] == f"{DIALOGUES[1][1]}\n"
