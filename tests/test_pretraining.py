"""The PT stage: how documents become blocks, what is learned, which files it leaves, how it resumes, its errors."""

import json
import math
import re
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from guide import GUIDE_PT
from peft import TaskType
from stage_runs import PARTS, RESULTS, load_for_training, logged, names, run_process, stage_flags
from tiny_families import save_tiny_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterable
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import merge_peft_adapter
import pretraining
from medtune.arguments import DataArguments
from medtune.errors import UserError
from medtune.models.adapters import load_with_adapter
from medtune.models.lineage import read_lineage
from medtune.reading.blocks import cut_blocks, document_end_id, learned_bytes_per_token, token_byte_lengths
from medtune.reading.encoders import DocumentEncoder
from medtune.reading.readers import load_documents
from medtune.reading.records import Document
from medtune.reading.stage_data import encode_records
from medtune.training.causal_lm_trainer import IGNORED_LABEL, Collator, loss_statistics, token_losses
from medtune.training.checkpoints import MANIFEST, write_manifest
from pretraining import last_tokens, stream_blocks, stream_data

TEXTS = [f"{PARTS[n % 8]}部不适第{n}种：多喝水，注意休息，{n}天不好请去医院就诊。Rest for {n} days." for n in range(40)]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("\n\n".join(TEXTS[:20]) + "\n", encoding="utf-8")
    lines = [json.dumps({"text": text, "from": "a book"}, ensure_ascii=False) for text in TEXTS[20:]]
    (folder / "deep/b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def flags(tiny_model_dir, data_dir, tmp_path):
    """A function that gives a short run's flags."""

    def build(**changes) -> list[str]:
        data = {"train_file_dir": data_dir, "validation_file_dir": data_dir, "do_eval": True}
        data |= {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": None}
        return stage_flags("pt", tiny_model_dir, tmp_path, **data | changes)

    return build


def documents_of(*lists: list[int]) -> dict[str, list]:
    return {"input_ids": [list(ids) for ids in lists], "source": [f"d:{n}" for n in range(1, len(lists) + 1)]}


def plain(blocks: dict[str, list]) -> dict[str, list]:
    return {
        name: [np.asarray(v).tolist() if name != "source" else v for v in column] for name, column in blocks.items()
    }


# ---------------------------------------------------------------- blocks


def test_blocks_hold_every_token_and_know_their_documents():
    blocks = plain(cut_blocks(documents_of([1, 2, 3], [4, 5], [6, 7, 8, 9, 10]), block_size=4))
    x = IGNORED_LABEL
    assert blocks == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]],
        "labels": [[x, 2, 3, x], [x, x, 7, 8], [x, 10]],
        "seq_lengths": [[3, 1], [1, 3], [2]],
        "length": [4, 4, 2],
        "source": [["d:1", "d:2"], ["d:2", "d:3"], ["d:3"]],
    }


@pytest.mark.parametrize("across", [False, True])
def test_a_last_token_with_a_block_to_itself_is_left_out(across):
    """Nothing precedes it, so a batch of this block alone would have nothing to learn, which stops a run."""
    blocks = plain(cut_blocks(documents_of([1, 2, 3], [4, 5], [6, 7, 8, 9]), 4, packing_across_documents=across))
    assert blocks["input_ids"] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_packing_across_documents_learns_all_but_the_first_token_of_a_block():
    blocks = plain(cut_blocks(documents_of([1, 2, 3], [4, 5], [6, 7]), 4, packing_across_documents=True))
    assert blocks["labels"] == [[IGNORED_LABEL, 2, 3, 4], [IGNORED_LABEL, 6, 7]]
    assert blocks["seq_lengths"] == [[4], [3]]
    assert blocks["source"] == [["d:1", "d:2"], ["d:2", "d:3"]]


def test_documents_with_rows_of_their_own_are_cut_each_by_itself():
    documents = documents_of([1, 2, 3, 4, 5, 6], [7, 8], [9, 10, 11, 12, 13])
    blocks = plain(cut_blocks(documents, block_size=4, one_document_a_row=True))
    assert blocks["input_ids"] == [[1, 2, 3, 4], [5, 6], [7, 8], [9, 10, 11, 12]]
    assert blocks["labels"] == [[IGNORED_LABEL, *ids[1:]] for ids in blocks["input_ids"]]
    assert blocks["seq_lengths"] == [[4], [2], [2], [4]]
    assert blocks["source"] == [["d:1"], ["d:1"], ["d:2"], ["d:3"]]


@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_random_documents(seed):
    rng = np.random.default_rng(seed)
    lists = [rng.integers(1, 99, rng.integers(1, 30)).tolist() for _ in range(rng.integers(1, 12))]
    size = int(rng.integers(2, 20))
    blocks = plain(cut_blocks(documents_of(*lists), size))
    joined = list(chain(*lists))
    kept = joined[:-1] if len(joined) % size == 1 else joined
    assert list(chain(*blocks["input_ids"])) == kept
    assert all(length == size for length in blocks["length"][:-1])
    for ids, labels, lengths in zip(blocks["input_ids"], blocks["labels"], blocks["seq_lengths"], strict=True):
        assert sum(lengths) == len(ids)
        assert min(lengths) > 0
        firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
        assert labels == [IGNORED_LABEL if at in firsts else token for at, token in enumerate(ids)]
    n_pieces = sum(map(len, blocks["seq_lengths"]))
    ends = np.cumsum(list(map(len, lists))).tolist()
    cuts_inside = set(range(size, len(kept), size)) - set(ends)
    assert n_pieces == sum(end < len(kept) for end in ends) + 1 + len(cuts_inside)


def test_the_end_of_joined_documents():
    documents = documents_of([1, 2, 3], [4, 5], [6, 7])
    assert last_tokens(documents, 3) == {"input_ids": [[5], [6, 7]], "source": ["d:2", "d:3"]}
    assert last_tokens(documents, 4) == {"input_ids": [[4, 5], [6, 7]], "source": ["d:2", "d:3"]}
    assert last_tokens(documents, 7) == documents


@pytest.mark.parametrize("limits", [{}, {"packing_across_documents": True}, {"one_document_a_row": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_streaming_gives_the_blocks_of_the_whole_text(data_dir, tiny_tokenizer, monkeypatch, batch, limits):
    monkeypatch.setattr(pretraining, "STREAM_BATCH", batch)
    files = [data_dir / "a.txt", data_dir / "deep/b.jsonl"]
    for size in range(47, 51):  # also such as leave one token over, in the end or after some documents
        encoder = DocumentEncoder(tiny_tokenizer, size, **limits)
        whole, _ = encode_records(load_documents(files)[0], encoder)
        assert list(stream_blocks(files, encoder, "error")) == whole.to_list()


@pytest.fixture
def stream(data_dir, tiny_tokenizer):
    """The data of a streamed run, and its arguments."""
    training_args = SimpleNamespace(max_steps=4, do_eval=False, seed=42, accelerator_config=SimpleNamespace())
    data_args = DataArguments(train_file_dir=str(data_dir))
    return stream_data(DocumentEncoder(tiny_tokenizer, 50), data_args, training_args, None).train, training_args


def test_each_pass_of_a_stream_has_all_blocks_in_an_order_of_its_own(stream):
    rows, _ = stream
    n_blocks = len({tuple(row["input_ids"]) for row in islice(rows, 200)})
    blocks = [tuple(row["input_ids"]) for row in islice(rows, 2 * n_blocks)]
    first, second = blocks[:n_blocks], blocks[n_blocks:]
    assert n_blocks > 4
    assert first != second
    assert sorted(first) == sorted(second)


def test_two_processes_share_a_stream(stream):
    stream, training_args = stream

    def first_batches(n_processes: int, index: int, n_batches: int) -> list[list[list[int]]]:
        loader = prepare_data_loader(
            DataLoader(stream, batch_size=2, collate_fn=list),
            num_processes=n_processes,
            process_index=index,
            dispatch_batches=training_args.accelerator_config.dispatch_batches,
        )
        return [[row["input_ids"] for row in batch] for batch in islice(loader, n_batches)]

    mine, others = first_batches(2, 0, 3), first_batches(2, 1, 3)
    assert list(chain(*zip(mine, others, strict=True))) == first_batches(1, 0, 6)


def test_documents_end_with_the_base_models_end_token(tiny_tokenizer, qwen_tokenizer):
    for tokenizer in (tiny_tokenizer, qwen_tokenizer):
        ids = DocumentEncoder(tokenizer)(Document(TEXTS[0], "a:1"))["input_ids"]
        assert tokenizer.decode(ids) == TEXTS[0] + "<|endoftext|>"
        assert ids[-1] == document_end_id(tokenizer)


# Special tokens of families, with the eos and the bos of their chat models and whether tokenizers write the bos.
MARKS = {
    "llama3": (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", ["<|begin_of_text|>"]),
    "gemma": (["<pad>", "<eos>", "<bos>", "<end_of_turn>"], "<end_of_turn>", ["<bos>"]),
    "mistral": (["<s>", "</s>", "[INST]"], "</s>", ["<s>"]),
    "lfm2": (["<|startoftext|>", "<|endoftext|>", "<|im_end|>"], "<|im_end|>", ["<|startoftext|>"]),
    "glm4": (["<|endoftext|>", "[gMASK]", "<sop>"], "<|endoftext|>", ["[gMASK]", "<sop>"]),
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", []),
    "others": (["<|end_of_sequence|>"], "<|end_of_sequence|>", []),
}
ENDS = {"llama3": "<|end_of_text|>", "gemma": "<eos>", "mistral": "</s>", "others": "<|end_of_sequence|>"}


@pytest.mark.parametrize("family", MARKS)
def test_documents_stand_between_the_marks_of_their_tokenizer(tiny_tokenizer, family):
    special, eos, starts = MARKS[family]
    content = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    content["added_tokens"], content["post_processor"] = [], None
    backend = Tokenizer.from_str(json.dumps(content))
    backend.add_special_tokens(special)
    if starts:
        pieces = [(token, backend.token_to_id(token)) for token in starts]
        backend.post_processor = TemplateProcessing(single=[*starts, "$A"], special_tokens=pieces)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    ids = DocumentEncoder(tokenizer)(Document(TEXTS[0], "a:1"))["input_ids"]
    end = ENDS.get(family, "<|endoftext|>")
    assert tokenizer.decode(ids) == "".join(starts) + TEXTS[0] + end
    is_usual = family in ("qwen", "others")
    assert DocumentEncoder(tokenizer).form == ("" if is_usual else f"between {' '.join([*starts, end])}")


@pytest.mark.parametrize("streaming", [None, True])
def test_a_run_whose_documents_had_another_form_is_not_resumed(flags, tmp_path, streaming):
    options = {"do_eval": None, "validation_file_dir": None, "streaming": streaming, "max_steps": 4}
    pretraining.main(flags(**options))
    (tmp_path / "out/loss.png").unlink()
    for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
        record = json.loads((checkpoint / "lineage.json").read_text(encoding="utf-8"))
        assert record["documents"] == ""
        record["documents"] = "between <bos> <eos>"
        (checkpoint / "lineage.json").write_text(json.dumps(record), encoding="utf-8")
    checkpoint = tmp_path / "out/checkpoint-2"
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    line = r"another form \(between <bos> <eos>; now only the end token behind each\); train it again"
    with pytest.raises(UserError, match=line):
        pretraining.main(flags(**options, resume_from_checkpoint=checkpoint))


def test_a_control_token_in_a_text_is_refused_or_left_out(tiny_tokenizer):
    texts = [Document("a good text", "a:1"), Document("a turn ends<|im_end|>", "a:2")]
    with pytest.raises(UserError, match=r"1 of 2 documents are bad.*\n.*a:2: control token: it holds <\|im_end\|>"):
        encode_records(texts, DocumentEncoder(tiny_tokenizer))
    blocks, report = encode_records(texts, DocumentEncoder(tiny_tokenizer), on_bad_data="drop")
    assert blocks["source"] == [["a:1"]]
    assert report.summary() == "kept 1 of 2 (1 control token)"


# ---------------------------------------------------------------- bits a byte


@pytest.mark.parametrize("text", ["高血压要少吃盐。", "naïve café 37.5℃\n", "emoji \U0001f600 and 𠮷"])
def test_bytes_of_tokens_add_up_to_the_text(tiny_tokenizer, qwen_tokenizer, text):
    for tokenizer in (tiny_tokenizer, qwen_tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())
        assert token_byte_lengths(tokenizer)[document_end_id(tokenizer)] == 0


def test_bits_per_byte_of_a_uniform_guess(tiny_tokenizer):
    """Guessing evenly among 2^k tokens costs k bits a token."""
    ids = tiny_tokenizer("高血压要少吃盐。")["input_ids"]
    per_token = learned_bytes_per_token(tiny_tokenizer, [[IGNORED_LABEL, *ids], [IGNORED_LABEL]])
    assert per_token == pytest.approx(24 / len(ids))
    sums = np.array([[math.log(2**10) * len(ids), 0, len(ids)]])
    metrics = loss_statistics(type("Prediction", (), {"predictions": sums}), per_token)
    assert metrics["bits_per_byte"] == pytest.approx(10 * len(ids) / 24)
    assert "bits_per_byte" not in loss_statistics(type("Prediction", (), {"predictions": sums}))


# ---------------------------------------------------------------- what a document sees


def test_a_document_in_a_block_has_the_losses_it_has_alone(tiny_model_dir, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()

    def document_losses(texts: list[str], across: bool = False) -> torch.Tensor:
        documents = [Document(text, "a") for text in texts]
        blocks, _ = encode_records(documents, DocumentEncoder(tiny_tokenizer, 1000, across))
        return learned_losses(model, tiny_tokenizer, blocks.to_list())

    alone = torch.cat([document_losses([text]) for text in TEXTS[:5]])
    together, across = document_losses(TEXTS[:5]), document_losses(TEXTS[:5], across=True)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert len(across) == len(alone) + 4  # the first token of each document but the first


def learned_losses(model, tokenizer, blocks: list[dict]) -> torch.Tensor:
    """[learned] losses of blocks, in one batch, as the stage's collator hands them over."""
    batch = Collator(tokenizer.pad_token_id)(blocks)
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1]
    return token_losses(logits[labels != IGNORED_LABEL], labels[labels != IGNORED_LABEL])


def test_rows_of_several_documents_have_positions_that_restart(tiny_tokenizer):
    rows = cut_blocks(documents_of([1, 2, 3], [4, 5]), 3)
    rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    batch = Collator(tiny_tokenizer.pad_token_id)(rows)
    pad, x = tiny_tokenizer.pad_token_id, IGNORED_LABEL
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, pad]]
    assert batch["labels"].tolist() == [[x, 2, 3], [x, 5, x]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["sources"] == ["d:1", "d:2"]


# ---------------------------------------------------------------- a run


def test_a_run_leaves_a_model_and_says_bits_per_byte(flags, tmp_path, data_dir, tiny_model_dir, capfd):
    metrics = pretraining.main(flags())
    out = tmp_path / "out"
    assert names(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-best"} | RESULTS
    per_token = metrics["eval_loss"] / math.log(2) / metrics["eval_bits_per_byte"]
    assert 1 < per_token < 6  # bytes
    lineage = read_lineage(out / "checkpoint-best")
    assert (lineage.base_model, lineage.parent, lineage.stage) == (str(tiny_model_dir), None, "pt")
    assert (lineage.template, lineage.data) == ("", str(data_dir))
    load_with_adapter(str(tiny_model_dir), str(out / "checkpoint-best"))
    log = re.sub(" +", " ", capfd.readouterr().err)
    assert "train documents kept 36 of 36" in log
    assert "eval documents kept 4 of 4, held out of the training data by the seed" in log
    assert "a document sees itself alone" in log
    assert "bits_per_byte" in log
    assert "supervised_finetuning.py --model_name_or_path" in log.splitlines()[-1]


ACROSS = "--packing_across_documents True goes on, and lets a document see the ones before it in its block"


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True, "gradient_checkpointing": True}, {"streaming": True}])
def test_documents_that_see_each_other_stop_the_run(flags, tmp_path, tiny_model_dir, options, capfd):
    """OPT makes no mask of positions."""
    model = save_tiny_model("opt", tmp_path / "opt", tiny_model_dir)
    if "streaming" in options:
        options = options | {"do_eval": None, "validation_file_dir": None}
    with pytest.raises(UserError, match=rf"^the documents of a row see each other in this model .*; {ACROSS}$"):
        pretraining.main(flags(model_name_or_path=model, padding_free=False, **options))
    assert "itself alone" not in capfd.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint*"))


@pytest.mark.parametrize("streaming", [None, True])
def test_a_document_has_rows_of_its_own_where_recurrent_layers_would_mix_those_of_a_block(
    flags, tmp_path, tiny_model_dir, streaming, capfd
):
    model = save_tiny_model("lfm2", tmp_path / "lfm2", tiny_model_dir)
    options = {"do_eval": None, "validation_file_dir": None, "streaming": streaming, "max_steps": 2}
    pretraining.main(flags(model_name_or_path=model, **options))
    log = re.sub(" +", " ", capfd.readouterr().err)
    assert "a document has rows of its own, which are padded: the recurrent layers of lfm2 keep texts apart only" in log
    assert "those of causal_conv1d (requirements/gpu.txt says how)" in log
    if not streaming:
        state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
        recorded = state["stateful_callbacks"]["CheckpointKeeper"]["attributes"]
        assert recorded["rows of training data"] >= len(TEXTS)


def test_documents_see_each_other_where_the_user_says_so(flags, tmp_path, tiny_model_dir, capfd):
    model = save_tiny_model("lfm2", tmp_path / "lfm2", tiny_model_dir)
    pretraining.main(flags(model_name_or_path=model, packing_across_documents=True, max_steps=1))
    log = re.sub(" +", " ", capfd.readouterr().err)
    assert "a document sees the ones before it in its block" in log
    assert "itself alone" not in log


def test_blocks_in_one_row_have_the_same_losses(flags, tmp_path):
    """In an evaluation too."""
    short = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "lora_dropout": 0}
    apart = pretraining.main(flags(**short, padding_free=False))
    one_row = pretraining.main(flags(**short, padding_free=True, output_dir=tmp_path / "flat"))
    assert logged(tmp_path / "flat") == pytest.approx(logged(tmp_path / "out"), abs=1e-5)
    assert one_row["eval_loss"] == pytest.approx(apart["eval_loss"], abs=1e-5)


def test_full_weights_learn_the_text(flags, tmp_path):
    pretraining.main(flags(use_peft=False, do_eval=None, validation_file_dir=None, max_steps=30, save_strategy="no"))
    run = logged(tmp_path / "out")
    assert run[30] < 0.6 * run[1]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-best")
    AutoTokenizer.from_pretrained(tmp_path / "out/checkpoint-best")


def test_the_second_run_takes_the_cache_and_another_block_size_does_not(flags, tmp_path, capfd):
    for changes, cached in (({}, False), ({}, True), ({"block_size": 32}, False), ({"overwrite_cache": True}, False)):
        pretraining.main(flags(max_steps=1, overwrite_output_dir=True, **changes))
        assert ("from the cache" in capfd.readouterr().err) is cached


def test_resume_gives_the_losses_of_an_uninterrupted_run(flags, tmp_path):
    pretraining.main(flags(output_dir=tmp_path / "whole"))
    pretraining.main(flags())
    (tmp_path / "out/loss.png").unlink()
    pretraining.main(flags(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2")))
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")


def test_streamed_run_resumes_too(flags, tmp_path):
    separate = tmp_path / "eval.txt"
    separate.write_text("\n".join(TEXTS[:4]), encoding="utf-8")
    streamed = {"streaming": True, "validation_file_dir": separate}
    pretraining.main(flags(output_dir=tmp_path / "whole", **streamed))
    pretraining.main(flags(**streamed))
    (tmp_path / "out/loss.png").unlink()
    pretraining.main(flags(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"), **streamed))
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")
    assert len(logged(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True, "max_steps": None}, "--streaming True: .*give --max_steps"),
        ({"streaming": True}, "--streaming True: no part of the training files is held out"),
        ({"streaming": True, "max_train_samples": 3, "do_eval": None}, "--max_train_samples draws from all records"),
        ({"block_size": 4}, "--block_size 4: too little"),
        ({"train_file_dir": None}, "--train_file_dir is missing"),
        ({"packing": True}, "--packing is not a flag of this stage"),
    ],
)
def test_what_cannot_be_done_is_one_line(flags, changes, message):
    with pytest.raises(UserError, match=message):
        pretraining.main(flags(**changes))


def test_bad_data_is_named_before_weights_load(flags, data_dir, monkeypatch):
    monkeypatch.setattr(pretraining, "load_for_training", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with (data_dir / "deep/b.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"question": "q", "answer": "a"}\n{"text": " "}\n{"text": 3}\n')
    with pytest.raises(UserError) as refused:
        pretraining.main(flags())
    lines = str(refused.value).splitlines()
    assert lines[0] == "3 of 43 records are bad:"
    assert "b.jsonl:21: no text: has the keys 'question', 'answer'; pretraining reads 'text'" in lines[1]
    assert "b.jsonl:22: empty text" in lines[2]
    assert "b.jsonl:23: not text" in lines[3]
    separate = data_dir / "a.txt"
    with pytest.raises(UserError, match=r"b\.jsonl:21: no text: .*--on_bad_data drop"):
        pretraining.main(flags(streaming=True, train_file_dir=data_dir / "deep", validation_file_dir=separate))


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head"])
def test_a_grown_vocabulary_is_learned_and_goes_on_to_the_next_stage(flags, tmp_path, tiny_model_dir, named):
    """New words whose embeddings are trained whole; the head shares them, before and after a merge."""
    grown, adapter, merged = tmp_path / "grown", tmp_path / "out/checkpoint-best", tmp_path / "merged"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert tokenizer.add_tokens(["多喝水", "去医院就诊"]) == 2
    model.resize_token_embeddings(len(tokenizer))
    for saved in (model, tokenizer):
        saved.save_pretrained(grown)
    new_word = tokenizer.convert_tokens_to_ids("去医院就诊")
    pretraining.main(flags(model_name_or_path=grown, modules_to_save=named, do_eval=None, max_steps=2))

    trained = load_with_adapter(str(grown), str(adapter), torch_dtype="float32").eval()
    embeddings, head = trained.get_input_embeddings().weight, trained.get_output_embeddings().weight
    assert torch.equal(embeddings, head)
    assert not torch.equal(embeddings[new_word], model.get_input_embeddings().weight[new_word])

    ids = torch.tensor([tokenizer("头部不适，多喝水，去医院就诊。")["input_ids"]])
    assert new_word in ids
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        continued = load_for_training(str(adapter), use_peft=True, modules_to_save="embed_tokens").eval()
        torch.testing.assert_close(continued(input_ids=ids).logits, expected)
        scorer = load_for_training(str(adapter), use_peft=True, task_type=TaskType.SEQ_CLS, pad_token_id=0)
        torch.testing.assert_close(scorer.get_input_embeddings().weight, embeddings)
        folders = ("--base_model", str(grown), "--lora_model", str(adapter), "--output_dir", str(merged))
        merge_peft_adapter.main([*folders, "--torch_dtype", "float32"])
        whole = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(whole(ids).logits, expected, atol=1e-4, rtol=0)
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight


def test_the_guides_command_as_it_stands(tiny_model_dir, data_dir, tmp_path):
    """Two processes over gloo, flag for flag; only model, data and folders are this machine's."""
    argv = [
        *f"{GUIDE_PT} --block_size 1024 --model_name_or_path {tiny_model_dir}".split(),
        *f"--train_file_dir {data_dir} --validation_file_dir {data_dir}".split(),
        *f"--output_dir {tmp_path / 'out'} --cache_dir {tmp_path / 'cache'}".split(),
    ]
    result = run_process("pretraining.py", argv, n_processes=2, CUDA_VISIBLE_DEVICES="0,1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out/checkpoint-best/adapter_model.safetensors").is_file()
    assert "2 process(es)" in result.stderr


def test_iterable_data_is_what_training_run_takes_for_streamed():
    """`datasets` makes its streams a kind of torch's."""
    from datasets import IterableDataset

    assert isinstance(IterableDataset.from_generator(lambda: iter([{"a": 1}])), TorchIterable)
