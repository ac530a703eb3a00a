"""`scripts/build_tiny_model.py`: tokenizer and model are real Qwen2 ones, and nothing is made twice."""

import build_tiny_model
import pytest
from build_tiny_model import main, read_texts, train_tokenizer, write_tiny_model

from medtune.errors import UserError

MESSAGES = [
    {"role": "user", "content": "感冒了怎么办？"},
    {"role": "assistant", "content": "多喝水。"},
    {"role": "user", "content": "还有呢？"},
]
SAMPLES = ["感冒了怎么办？", "It's 38.5°C,\n\n  they'LL see\r\n", "é e\u0301 甲\U0001f600", " a  b\t"]


@pytest.fixture
def data_dir(tmp_path, write_jsonl):
    write_jsonl("data/finetune/a.jsonl", [{"conversations": [{"from": "human", "value": "头痛怎么办？"}]}])
    (tmp_path / "data/pretrain").mkdir()
    (tmp_path / "data/pretrain/b.txt").write_text("高血压要少吃盐。\n\n  按时服药。\n", encoding="utf-8")
    (tmp_path / "data/README.md").write_text("no training text\n", encoding="utf-8")
    return tmp_path / "data"


def test_the_folder_loads_like_a_downloaded_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer.is_fast
    assert isinstance(model, Qwen2ForCausalLM)
    config = model.config
    assert config.hidden_size // config.num_attention_heads == 64
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert sorted(path.name for path in tiny_model_dir.iterdir()) == [
        *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("tiny_model.json", "tokenizer.json", "tokenizer_config.json"),
    ]


def test_default_size_is_a_few_million_parameters(tiny_tokenizer):
    model = build_tiny_model.build_model(tiny_tokenizer, vocab_size=build_tiny_model.VOCAB_SIZE)
    assert 1.5e6 < model.num_parameters() < 3e6


def test_the_shape_of_the_base_model_is_small_enough_to_ship(tiny_tokenizer):
    shape = {name: value for name, value in build_tiny_model.SHAPES["base"].items() if name != "max_token_length"}
    model = build_tiny_model.build_model(tiny_tokenizer, **shape)
    assert 4e6 < model.num_parameters() < 7.5e6
    assert model.config.hidden_size // model.config.num_attention_heads == 64


def test_no_token_has_more_bytes_than_asked():
    texts = ["感冒后咳嗽越来越突出，咳久了胸腹肌肉酸。"] * 20
    free, limited = (train_tokenizer(texts, 600, limit) for limit in (None, 12))
    longest = [
        max(map(len, tokenizer.convert_ids_to_tokens(range(len(tokenizer) - 3)))) for tokenizer in (free, limited)
    ]
    assert longest[0] > 12 == longest[1]


def test_what_a_block_adds_begins_as_small_as_the_embeddings(tiny_tokenizer):
    model = build_tiny_model.build_model(tiny_tokenizer)
    input_ids = tiny_tokenizer(SAMPLES[0], return_tensors="pt").input_ids
    embeddings, first, *_ = model(input_ids, output_hidden_states=True).hidden_states
    assert 0.2 < ((first - embeddings).std() / embeddings.std()).item() < 2


def test_special_tokens_follow_the_vocabulary_as_in_qwen(tiny_tokenizer):
    specials = [tiny_tokenizer.convert_tokens_to_ids(token) for token in build_tiny_model.SPECIAL_TOKENS]
    assert specials == list(range(len(tiny_tokenizer) - 3, len(tiny_tokenizer)))
    assert (tiny_tokenizer.eos_token, tiny_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tiny_tokenizer.bos_token is None
    assert tiny_tokenizer("<|im_start|>a<|im_end|>").input_ids[::2] == specials[1:]
    assert tiny_tokenizer.decode(specials, skip_special_tokens=True) == ""


def test_text_survives_and_is_split_as_by_qwen(tiny_tokenizer, qwen_tokenizer):
    tiny, qwen = tiny_tokenizer.backend_tokenizer, qwen_tokenizer.backend_tokenizer
    for sample in SAMPLES:
        assert tiny.normalizer.normalize_str(sample) == qwen.normalizer.normalize_str(sample)
        assert tiny.pre_tokenizer.pre_tokenize_str(sample) == qwen.pre_tokenizer.pre_tokenize_str(sample)
        decoded = tiny_tokenizer.decode(tiny_tokenizer(sample).input_ids)
        assert decoded == tiny.normalizer.normalize_str(sample)


def test_chat_template_is_the_named_one(tiny_tokenizer):
    from template import named_template

    assert tiny_tokenizer.chat_template == named_template("qwen")
    text = tiny_tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text.endswith("多喝水。<|im_end|>\n<|im_start|>user\n还有呢？<|im_end|>\n<|im_start|>assistant\n")


def test_the_same_texts_give_the_same_tokenizer():
    texts = ["感冒了怎么办？多喝水。", "发烧怎么办？多喝水。"] * 3
    first, second = (train_tokenizer(texts, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_small_corpus_gives_a_smaller_vocabulary():
    assert 259 < len(train_tokenizer(["感冒感冒"] * 2, 4096)) < 300


def test_reads_what_is_said_for_training_and_nothing_else(data_dir, write_jsonl):
    write_jsonl("data/eval/held_out.jsonl", [{"question": "held out"}])
    assert read_texts(data_dir) == ["头痛怎么办？", "高血压要少吃盐。", "按时服药。"]


def test_second_run_does_nothing_and_changed_data_makes_it_anew(data_dir, tmp_path, capsys, tiny_model_dir):
    flags = ["--output_dir", str(tmp_path / "tiny"), "--data_dir", str(data_dir), "--vocab_size", "300"]
    main(flags)
    weights = tmp_path / "tiny/model.safetensors"
    made_at = weights.stat().st_mtime_ns
    main(flags)
    assert weights.stat().st_mtime_ns == made_at
    with (data_dir / "pretrain/b.txt").open("a", encoding="utf-8") as file:
        file.write("多喝水。\n")
    main(flags)
    assert weights.stat().st_mtime_ns > made_at
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split(" ")[0] for line in lines] == ["wrote", "already", "wrote"]


def test_a_stopped_run_is_done_again(tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_tiny_model, "build_model", stop)
        write_tiny_model(tmp_path / "tiny", ["感冒"], vocab_size=300)
    assert write_tiny_model(tmp_path / "tiny", ["感冒"], vocab_size=300, num_hidden_layers=1)
    assert not write_tiny_model(tmp_path / "tiny", ["感冒"], vocab_size=300, num_hidden_layers=1)


def test_leaves_the_callers_random_numbers_alone(tmp_path):
    import torch

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    write_tiny_model(tmp_path / "tiny", ["感冒"], vocab_size=300, num_hidden_layers=1)
    assert torch.equal(torch.rand(3), expected)


def test_user_errors(tmp_path, write_jsonl):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--output_dir .*mine: holds something else"):
        write_tiny_model(tmp_path / "mine", ["感冒"])
    with pytest.raises(UserError, match=r"--vocab_size 100: .* need 259"):
        train_tokenizer(["感冒"], 100)
    with pytest.raises(UserError, match=r"--data_dir .*nowhere: no \.txt or \.jsonl"):
        read_texts(tmp_path / "nowhere")
    broken = write_jsonl("broken/finetune/a.jsonl", [{"value": "感冒"}])
    with broken.open("a", encoding="utf-8") as file:
        file.write("{'value'\n")
    with pytest.raises(UserError, match=r"a\.jsonl:2: not a JSON record"):
        read_texts(tmp_path / "broken")
