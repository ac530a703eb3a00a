"""Compiled layers: the figures of plain ones, compiled once for all lengths and layouts."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from medtune.models.logps import SparseHead
from medtune.models.text_attention import Layout, attend_by_text
from medtune.training.compilation import compile_layers


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(Layout))
def test_layers_are_compiled_once_for_all_lengths(tiny_model_dir, layout):
    plain, compiled = (AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32) for _ in range(2))
    torch.compiler.reset()
    compile_layers(compiled, "inductor", None)
    heads = {model: SparseHead(model) for model in (plain, compiled)}
    n_graphs = []
    for n_rows, length in ((4, 24), (4, 17), (3, 33), (2, 20), (4, 40)):
        torch.manual_seed(length)
        ids, attention_mask = torch.randint(300, (n_rows, length)), torch.ones(n_rows, length, dtype=torch.long)
        attention_mask[0, length - 5 :] = 0
        ids[1, :16] = ids[0, :16]
        for model, head in heads.items():
            attend_by_text(model, layout is not Layout.PADDED)
            logps = head.logps(model, ids, attention_mask, attention_mask[:, 1:].bool(), layout)
            logps.sum().backward()
        n_graphs.append(counters["stats"]["unique_graphs"])
    gradients = [{name: weight.grad for name, weight in model.named_parameters()} for model in heads]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    assert 0 < n_graphs[0] == n_graphs[-1]
