"""Logged numbers: means of losses with their own counts and weights, speed, and totals that survive
a restart."""

import json
import math

import pytest
import torch
from conftest import in_processes
from packed_reference import small_model

from pretrain.batch import Loss
from pretrain.metrics import LossTotals, Meter
from pretrain.runtime.distributed import World, start, stop
from pretrain.runtime.sharding import place

CPU = torch.device("cpu")


def losses(mlm=30.0, nsp=4.0, z=5.0):
    """Terms with and without accuracies, one with the count of another."""
    return {
        "mlm": Loss(torch.tensor(mlm), torch.tensor(2)),
        "nsp": Loss(torch.tensor(nsp), torch.tensor(6), weight=0.5),
        "z": Loss(torch.tensor(z), weight=0.1, count="mlm"),
    }


def test_means_divide_by_counts_and_the_loss_is_their_weighted_sum():
    means = LossTotals.of(losses(), {"mlm": 10, "nsp": 8}).read(CPU).means()
    assert means == pytest.approx(
        {
            "loss": 3.0 + 0.5 * 0.5 + 0.1 * 0.5,
            "mlm_loss": 3.0,
            "mlm_accuracy": 0.2,
            "nsp_loss": 0.5,
            "nsp_accuracy": 0.75,
            "z_loss": 0.5,
            "perplexity": math.e**3,
        }
    )


def test_a_term_with_count_0_has_no_mean():
    means = LossTotals.of(losses(mlm=1e6), {"mlm": 1, "nsp": 0}).read(CPU).means()
    assert means["mlm_loss"] == 1e6 and math.isfinite(means["perplexity"])
    assert not {"nsp_loss", "nsp_accuracy"} & means.keys()
    assert LossTotals.of(losses(), {"mlm": 0, "nsp": 0}).read(CPU).means() == {}


def test_a_term_whose_count_the_batch_lacks_is_named():
    with pytest.raises(KeyError, match="'z'.*'words'"):
        LossTotals.of({"z": Loss(torch.tensor(1.0), count="words")}, {"mlm": 10})


def test_totals_add_up_in_double_precision_without_a_graph():
    total = LossTotals()
    batches = [losses(mlm=value) for value in (0.1, 1e8, 0.2)]
    for batch in batches:
        total += LossTotals.of(batch, {"mlm": 3, "nsp": 1})
    assert all(
        value.dtype == torch.float64 and not value.requires_grad for value in total.sums.values()
    )
    expected = math.fsum(batch["mlm"].sum.double().item() for batch in batches)
    assert total.read(CPU).sums["mlm"] == pytest.approx(expected, rel=1e-15)
    assert total.read(CPU).counts == {"mlm": 9, "nsp": 3}


class SmallBatch:
    """The part of a batch that the meter reads."""

    num_tokens, num_sequences, shortfall = 30, 2, 1
    input_ids = torch.zeros(32)
    counts = {"mlm": 5, "nsp": 2}


def fill(meter, steps):
    for _ in range(steps):
        with meter.waiting():
            pass
        totals = LossTotals.of(losses(), {"mlm": 5, "nsp": 2})
        meter.add(totals, {"optim/grad_norm": torch.tensor(0.5)}, [SmallBatch()], flops=10.0)


def test_a_row_covers_the_steps_since_the_last_one_and_the_summary_all():
    meter = Meter(CPU, World(), 1e12)
    fill(meter, 3)
    meter.flush()
    fill(meter, 5)
    row, summary = meter.flush(), meter.summary()
    assert row["speed/padding"] == pytest.approx(1 - 30 / 32) and row["optim/grad_norm"] == 0.5
    assert row["speed/tokens_per_second"] > 0 and 0 <= row["speed/data_wait"] <= 1
    assert row["memory/peak_bytes"] > 0 and row["train/z_loss"] == 1.0
    assert summary["real_tokens"] == 8 * 30 and summary["mask_shortfall"] == 8 / 40
    assert summary["train_mlm_loss"] == 6.0


def test_a_logged_number_of_sharded_weights_is_that_of_whole_ones(tmp_path):
    """A sum over a sharded weight is a sum over one part on each process, still to be added up."""

    def main(argv):
        world, device = start("cpu")
        weights = place(small_model(40), device, shard=True).named_parameters()
        meter = Meter(device, world, 1.0)
        sums = {f"sum/{name}": weight.detach().sum() for name, weight in weights}
        meter.add(LossTotals(), sums, [SmallBatch()], flops=10.0)
        (tmp_path / f"{world.rank}").write_text(json.dumps(meter.flush()))
        stop()

    ended = in_processes(tmp_path, main, [], count=2)
    assert [code for code, _ in ended] == [0, 0], ended
    for rank in (0, 1):
        row = json.loads((tmp_path / f"{rank}").read_text())
        for name, weight in small_model(40).named_parameters():
            assert row[f"sum/{name}"] == pytest.approx(weight.sum().item(), abs=1e-5)


def test_only_the_first_process_restores_the_sums():
    """The state holds the sums of all processes; loading it in each would multiply them."""
    first, second = Meter(CPU, World(0, 2), 1.0), Meter(CPU, World(1, 2), 1.0)
    fill(first, 1)
    state = first.state_dict()
    for meter in (first, second):
        meter.load_state_dict(state)
    assert first.losses.sums["mlm"] == 30.0 and second.losses.sums["mlm"] == 0.0
    assert first.sums["tokens"] == 30 and second.sums["tokens"] == 0.0
