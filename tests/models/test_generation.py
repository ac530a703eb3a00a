"""`generation.py`: batches equal single prompts, replies end where they should, streams hold whole characters."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, set_seed

from medtune.errors import UserError
from medtune.models.decoding import Decoding
from medtune.models.generation import ReplyRow, generate_replies, stream_reply

TEXTS = ["感冒了应该怎么办？", "多喝水", "高血压患者在饮食上需要注意什么？少吃盐，多吃蔬菜和水果。", "See a doctor"]
NEVER = [599]  # beyond the vocabulary, so that no reply holds it
SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer):
    return [tiny_tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture
def adapted(tiny_model_dir):
    """The same model with random LoRA weights and dropout."""
    set_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.9)
    config.init_lora_weights = False
    return get_peft_model(base, config)


def greedy_by_hand(model, prompt: list[int], n_tokens: int) -> list[int]:
    """New ids by whole forwards, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_batch_gives_what_each_prompt_gives_alone(model, tiny_tokenizer, prompts, batch_size):
    replies = generate_replies(model, tiny_tokenizer, prompts, NEVER, SHORT, batch_size)
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.text == tiny_tokenizer.decode(greedy_by_hand(model, prompt, 8), skip_special_tokens=True).strip()
        assert (reply.ended, reply.n_tokens) == (False, 8)


def test_longest_prompts_go_first_and_progress_is_told(model, tiny_tokenizer, prompts):
    shapes, done = [], []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    generate_replies(model, tiny_tokenizer, prompts, NEVER, SHORT, 3, on_progress=done.append)
    hook.remove()
    lengths = sorted(map(len, prompts))
    assert [shape for shape in shapes if shape[1] > 1] == [(3, lengths[-1]), (1, lengths[0])]
    assert done == [3, 4]


def test_no_prompts_give_no_replies(model, tiny_tokenizer):
    assert generate_replies(model, tiny_tokenizer, [], NEVER, SHORT) == []


def test_a_stop_token_ends_a_reply_and_is_no_part_of_it(model, tiny_tokenizer, prompts):
    new_ids = greedy_by_hand(model, prompts[0], 8)
    # The token that comes latest for the first time.
    stop = max(set(new_ids), key=new_ids.index)
    n_before = new_ids.index(stop)
    (reply,) = generate_replies(model, tiny_tokenizer, prompts[:1], [*NEVER, stop], SHORT)
    assert reply.ended
    assert reply.n_tokens == n_before + 1
    assert reply.text == tiny_tokenizer.decode(new_ids[:n_before], skip_special_tokens=True).strip()


def test_rows_that_end_early_are_told_from_rows_that_are_cut(model, tiny_tokenizer, prompts):
    alone = [greedy_by_hand(model, prompt, 8) for prompt in prompts]
    replies = generate_replies(model, tiny_tokenizer, prompts, [alone[0][1]], SHORT)
    for ids, reply in zip(alone, replies, strict=True):
        assert reply.ended == (alone[0][1] in ids)
        assert reply.n_tokens == (ids.index(alone[0][1]) + 1 if reply.ended else 8)
    assert replies[0].ended


# ---------------------------------------------------------------- decoding


def test_defaults_of_the_checkpoint_do_not_leak(model, tiny_tokenizer, prompts, monkeypatch, caplog):
    plain = generate_replies(model, tiny_tokenizer, prompts, NEVER, SHORT)
    settings = {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.1, "repetition_penalty": 9.0}
    leaky = GenerationConfig(**settings, max_length=3, min_new_tokens=2, eos_token_id=5, bad_words_ids=[[1], [2], [3]])
    monkeypatch.setattr(model, "generation_config", leaky)
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        assert generate_replies(model, tiny_tokenizer, prompts, NEVER, SHORT) == plain
    assert not caplog.records
    assert model.generation_config is leaky


def test_sampling_draws_by_the_seed(model, tiny_tokenizer, prompts):
    def drawn(seed: int, **decoding) -> list[str]:
        set_seed(seed)
        decoding = Decoding(max_new_tokens=8, **decoding)
        return [reply.text for reply in generate_replies(model, tiny_tokenizer, prompts, NEVER, decoding)]

    greedy = drawn(1)
    assert drawn(1, temperature=1.0) == drawn(1, temperature=1.0) != drawn(2, temperature=1.0)
    assert drawn(1, temperature=1.0, top_k=1) == greedy
    assert drawn(1, temperature=1.0, top_p=1e-6) == greedy
    assert drawn(1, repetition_penalty=3.0) != greedy


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 1}])
def test_a_repetition_penalty_leaves_stop_tokens_alone(tiny_model_dir, tiny_tokenizer, options):
    """The end token stands in every earlier turn of the prompt, and is the likeliest here by less than the penalty."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    stop = tiny_tokenizer.eos_token_id

    def prefer_stop(head, inputs, logits):
        logits[..., stop] = 0
        logits[..., stop] = 1.1 * logits.max(dim=-1).values

    model.lm_head.register_forward_hook(prefer_stop)
    prompts = [[*tiny_tokenizer.encode(text), stop, *tiny_tokenizer.encode(text)] for text in TEXTS]
    decoding = Decoding(max_new_tokens=4, repetition_penalty=1.3, **options)
    for reply in generate_replies(model, tiny_tokenizer, prompts, [stop], decoding):
        assert (reply.ended, reply.n_tokens, reply.text) == (True, 1, "")
    pieces = []
    assert stream_reply(model, tiny_tokenizer, prompts[0], [stop], decoding, pieces.append).ended


def test_a_repetition_penalty_touches_all_other_tokens(model, tiny_tokenizer, prompts):
    penalty = {"repetition_penalty": 1.3, "max_new_tokens": 8, "do_sample": False}
    for prompt in prompts:
        expected = model.generate(torch.tensor([prompt]), eos_token_id=NEVER, **penalty)[0, len(prompt) :]
        decoding = Decoding(max_new_tokens=8, repetition_penalty=1.3)
        (reply,) = generate_replies(model, tiny_tokenizer, [prompt], NEVER, decoding)
        assert reply.text == tiny_tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1e-320},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.5},
        {"temperature": 1.0, "top_k": -1},
        {"repetition_penalty": 0.0},
        {"top_p": 0.9},
        {"top_k": 5},
    ],
)
def test_decoding_that_makes_no_sense_is_refused(fields):
    *_, last = fields
    with pytest.raises(UserError, match=f"--{last}"):
        Decoding(**fields)


# ---------------------------------------------------------------- stop texts


@pytest.fixture(scope="module")
def spoken(model, tiny_tokenizer, prompts):
    """What the model says greedily to the first prompt, eight tokens of it."""
    return tiny_tokenizer.decode(greedy_by_hand(model, prompts[0], 8), skip_special_tokens=True)


def test_a_stop_text_ends_a_reply_and_is_no_part_of_it(model, tiny_tokenizer, prompts, spoken):
    stop = spoken[len(spoken) // 2 :][:2]
    decoding = Decoding(max_new_tokens=64, stop=["never said", stop])
    replies = generate_replies(model, tiny_tokenizer, prompts, NEVER, decoding)
    assert replies[0].text == spoken[: spoken.index(stop)].strip()
    assert replies[0].ended
    assert 1 <= replies[0].n_tokens <= 8
    # The other rows of the batch go on as they would alone.
    for prompt, reply in zip(prompts, replies, strict=True):
        assert generate_replies(model, tiny_tokenizer, [prompt], NEVER, decoding) == [reply]


def test_no_piece_of_a_stream_holds_a_part_of_a_stop_text(model, tiny_tokenizer, prompts, spoken):
    stop = spoken[len(spoken) // 2 :][:2]
    pieces = []
    reply = stream_reply(
        model, tiny_tokenizer, prompts[0], NEVER, Decoding(max_new_tokens=64, stop=[stop]), pieces.append
    )
    assert "".join(pieces).strip() == reply.text == spoken[: spoken.index(stop)].strip()


def streamed(tokenizer, ids: list[int], stop: list[str] | None = None) -> Iterator[str]:
    """What a stream has passed on after each token, and last after the end token."""
    pieces = []
    row = ReplyRow(tokenizer, [1], NEVER, Decoding(max_new_tokens=99, stop=stop), 0, pieces.append)
    for token in [*ids, *NEVER]:
        row.append(token)
        yield "".join(pieces)


def test_what_only_looked_like_a_stop_text_is_said(tiny_tokenizer):
    text = "多喝水，注意"
    *before, last = streamed(tiny_tokenizer, tiny_tokenizer(text)["input_ids"], stop=["水，休息"])
    assert set(before) <= {"", "多", "多喝", "多喝水，注", text}
    assert last == text


def test_an_empty_stop_text_is_refused():
    with pytest.raises(UserError, match="--stop: an empty text"):
        Decoding(stop=["好", ""])


# ---------------------------------------------------------------- the model is left as it was


def test_training_state_is_put_back_module_by_module(adapted, tiny_tokenizer, prompts):
    adapted.train()
    frozen = adapted.get_base_model().model.layers[0].mlp
    frozen.eval()
    before = [module.training for module in adapted.modules()]
    first = generate_replies(adapted, tiny_tokenizer, prompts, NEVER, SHORT)
    assert [module.training for module in adapted.modules()] == before
    # Dropout of 0.9 was off.
    assert generate_replies(adapted, tiny_tokenizer, prompts, NEVER, SHORT) == first


def test_state_is_put_back_after_an_error(adapted, tiny_tokenizer, prompts, monkeypatch):
    core = adapted.get_base_model().train()

    def fail(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(core, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        generate_replies(adapted, tiny_tokenizer, prompts, NEVER, SHORT)
    assert adapted.training


def test_the_adapter_takes_part(adapted, model, tiny_tokenizer, prompts):
    with_adapter = generate_replies(adapted, tiny_tokenizer, prompts, NEVER, SHORT)
    assert with_adapter != generate_replies(model, tiny_tokenizer, prompts, NEVER, SHORT)
    by_hand = greedy_by_hand(adapted.eval(), prompts[0], 8)
    assert with_adapter[0].text == tiny_tokenizer.decode(by_hand, skip_special_tokens=True).strip()


# ---------------------------------------------------------------- streams


def test_a_stream_gives_the_same_reply_in_pieces(model, tiny_tokenizer, prompts):
    for prompt in prompts:
        pieces = []
        reply = stream_reply(model, tiny_tokenizer, prompt, NEVER, SHORT, pieces.append)
        assert [reply] == generate_replies(model, tiny_tokenizer, [prompt], NEVER, SHORT)
        assert "".join(pieces).strip() == reply.text


def test_no_piece_holds_a_part_of_a_character(tiny_tokenizer):
    """The characters are rare, so that the tiny vocabulary writes each in several byte tokens."""
    text = "龘𠮷é\U0001f600x 好 "
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(ids) > len(text)
    passed_on = list(streamed(tiny_tokenizer, ids))
    assert passed_on[-1] == text
    assert not any("\ufffd" in so_far for so_far in passed_on)
    assert len(set(passed_on)) > 4


def test_a_character_that_never_gets_whole_comes_at_the_end(tiny_tokenizer):
    ids = tiny_tokenizer("好龘")["input_ids"]
    *_, before, last = streamed(tiny_tokenizer, ids[:-1])
    assert before == "好"
    assert last.startswith("好\ufffd")
