"""Conversations against transformers' own `generate` on the template; a full context, interrupts, refusals."""

import os
import signal
from importlib import resources

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.trainer.chatting import CHATML, CONTEXT, DIALOGUES, SYSTEM, chat_tokenizer
from zeropipe.data_prep.errors import UserError
from zeropipe.trainer.evaluation.chat import Conversation
from zeropipe.trainer.evaluation.chat_format import ChatFormat
from zeropipe.trainer.evaluation.generation import Sampling, generate

GREEDY = Sampling(max_new_tokens=30)


@pytest.fixture(scope="module")
def model(learned):
    return AutoModelForCausalLM.from_pretrained(learned).eval()


@pytest.fixture(scope="module")
def tokenizer(learned):
    return AutoTokenizer.from_pretrained(learned)


@pytest.fixture
def start(model, tokenizer):
    return lambda sampling=GREEDY, **settings: Conversation(model, ChatFormat(tokenizer), sampling, **settings)


def plain_answer(model, tokenizer, messages, new_tokens=30) -> str:
    """By transformers alone; the ids of what may end the answer are written down here."""
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    with torch.no_grad():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends, pad_token_id=0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_two_greedy_turns_equal_plain_transformers(start, model, tokenizer, dialogue, system):
    conversation = start(system=system)
    messages = [{"role": "system", "content": system}] if system else []
    for place in (0, 2):
        pieces = []
        answer = conversation.say(dialogue[place], pieces.append)
        messages.append({"role": "user", "content": dialogue[place]})
        plain = plain_answer(model, tokenizer, messages)
        assert plain == dialogue[place + 1]  # it knows the second answer by the first question only
        assert answer.text == "".join(pieces) == plain
        assert len(pieces) > 1 and answer.ended and answer.tokens > 1 and not answer.dropped
        messages.append({"role": "assistant", "content": plain})


def test_an_unknown_road_equals_plain_transformers_too(start, model, tokenizer):
    conversation, messages = start(Sampling(max_new_tokens=9)), []
    for text in ("Three?\nred", "nothing <|im_end|> of it"):
        messages.append({"role": "user", "content": text})
        plain = plain_answer(model, tokenizer, messages, 9)
        assert conversation.say(text).text == plain
        messages.append({"role": "assistant", "content": plain})
    assert conversation.messages == messages


def test_a_new_conversation_forgets_and_draws_the_same(start):
    conversation = start(Sampling(1.5, seed=3, max_new_tokens=12))
    first = [conversation.say("two").text for _ in range(3)]
    assert len(conversation.messages) == 6 and len(set(first)) == 3
    conversation.reset()
    assert [conversation.say("two").text for _ in range(3)] == first
    conversation.messages = []  # the same state, a later turn: other draws
    assert conversation.say("two").text != first[0]
    other = start(Sampling(1.5, seed=4, max_new_tokens=12))
    assert [other.say("two").text for _ in range(3)] != first


def test_a_full_context_drops_the_oldest_and_says_so(start, tokenizer):
    conversation = start(Sampling(max_new_tokens=24), system=SYSTEM)
    dropped, spoken = [], []
    for number in range(8):
        before = list(conversation.messages)
        answer = conversation.say(f"What is {number}?")
        dropped.append(answer.dropped)
        spoken.append(answer)
        kept = before[2 * answer.dropped :]
        assert conversation.messages[:-2] == kept and conversation.messages[-2]["content"] == answer.prompt
        fresh = start(Sampling(max_new_tokens=24), system=SYSTEM)
        fresh.messages = kept
        again = fresh.say(answer.prompt)
        assert (again.text, again.dropped) == (answer.text, 0)
        ids = tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, *conversation.messages[:-1]],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert len(ids) + 24 <= CONTEXT
    assert dropped[0] == 0 and sum(dropped) >= 3


def test_a_turn_that_is_too_long_alone_is_refused_and_leaves_no_trace(start):
    conversation = start(system=SYSTEM)
    conversation.say("What is red?")
    before = list(conversation.messages)
    with pytest.raises(UserError, match=rf"context of {CONTEXT}; shorten it or ask for at most \d+ new tokens"):
        conversation.say("word " * 60)
    assert conversation.messages == before
    assert conversation.say("And two?").text == "A number."


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(start):
    conversation = start()
    pieces = []

    def write(text):
        pieces.append(text)
        if len(pieces) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    answer = conversation.say("What is red?", write)
    assert answer.stopped and not answer.ended and answer.text == "".join(pieces)
    assert DIALOGUES[0][1].startswith(answer.text) and answer.text != DIALOGUES[0][1]
    assert conversation.messages[1] == {"role": "assistant", "content": answer.text}
    assert not conversation.say("And two?").stopped


def test_the_limit_is_no_end(start):
    answer = start(Sampling(max_new_tokens=2)).say("What is red?")
    assert answer.tokens == 2 and not answer.ended and DIALOGUES[0][1].startswith(answer.text)


@pytest.mark.parametrize(
    ("family", "end"),
    [
        ("qwen2_5", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("cohere", "<|END_OF_TURN_TOKEN|>"),
        ("deepseekv3", "<｜end▁of▁sentence｜>"),
    ],
)
def test_the_end_of_turn_of_other_families(family, end):
    template = (resources.files("trl") / "chat_templates" / f"{family}.jinja").read_text("utf-8")
    marks = ["<|eot_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>"]
    tokenizer = chat_tokenizer(*marks)
    assert ChatFormat(tokenizer, template).end_of_turn() == [tokenizer.convert_tokens_to_ids(end)]


def test_templates_without_an_end_and_templates_that_fail(tokenizer, model):
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert ChatFormat(tokenizer, plain).end_of_turn() == []
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        ChatFormat(tokenizer, "{{ messages[0]['content'] }}").end_of_turn()
    with pytest.raises(UserError, match=r"fails on a conversation of user, assistant: .*end"):
        ChatFormat(tokenizer, "{% for m in messages %}").end_of_turn()
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    conversation = Conversation(model, ChatFormat(tokenizer, strict), GREEDY, SYSTEM)
    with pytest.raises(UserError, match="conversation of system, user: no system here"):
        conversation.say("What is red?")
    bare = chat_tokenizer()
    bare.chat_template = None
    with pytest.raises(UserError, match="--chat-template FILE"):
        ChatFormat(bare)
    assert ChatFormat(bare, CHATML).end_of_turn() == [2]
    with pytest.raises(UserError, match="--tokenizer"):
        ChatFormat(None)


def test_prompts_as_turns_in_one_batch(model, tokenizer, start):
    prompts = [dialogue[0] for dialogue in DIALOGUES]
    for system in (None, SYSTEM):
        results = generate(model, tokenizer, prompts, GREEDY, ChatFormat(tokenizer), system)
        assert [result.text for result in results] == [start(system=system).say(prompt).text for prompt in prompts]
        assert all(result.ended for result in results)
