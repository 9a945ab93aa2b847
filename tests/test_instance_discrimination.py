"""Memory bank, both objectives and the k-NN, each against a slow version with loops."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from test_input_pipeline import encoded, make_rows, noise, rows_of

from datasets_scripts import load_corpus
from dls_training import MemoryBank
from dls_training.clips import ClipStore
from dls_training.health import Visits, bank_similarity, has_finite_weights
from dls_training.input_pipeline import ViewMaker, training_loader
from dls_training.instance_discrimination import (
    InstanceDiscrimination,
    PretextStep,
    nce_logits,
    nce_loss,
    softmax_loss,
)
from dls_training.loop import GlobalBatch, TrainingLoop
from dls_training.nearest_neighbours import NearestNeighbourTests, knn_accuracy_by_fold, weighted_knn
from dls_training.record import Record
from dls_training.settings import PretrainingSettings
from modeling_dls import ESResNetConfig, ESResNetFeatureExtractor, ESResNetForInstanceDiscrimination

ROOT = Path(__file__).resolve().parents[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(rows, dim, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(rows, dim, generator=generator(seed), dtype=torch.float64), dim=-1).to(dtype)


# Memory bank


def test_importing_the_package_alone_does_not_load_torch():
    code = "import sys, dls_training, dls_training.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_package_has_no_other_names_on_demand():
    import dls_training

    with pytest.raises(AttributeError, match="NoSuchThing"):
        _ = dls_training.NoSuchThing


def test_bank_starts_from_seeded_unit_vectors():
    torch.manual_seed(1)
    bank = MemoryBank(50, 16, seed=3)
    torch.manual_seed(2)  # the global state has no say
    again = MemoryBank(50, 16, seed=3)
    assert bank.vectors.shape == (50, 16) and bank.vectors.dtype == torch.float32 and len(bank) == 50
    assert torch.equal(bank.vectors, again.vectors)
    assert not torch.equal(bank.vectors, MemoryBank(50, 16, seed=4).vectors)
    torch.testing.assert_close(bank.vectors.norm(dim=-1), torch.ones(50))
    # Spread over the sphere: the mean of 50 random unit vectors is short.
    assert bank.vectors.mean(dim=0).norm() < 0.4
    assert bank.Z.dtype == torch.float64 and bank.Z.item() == 0
    assert bank.keys.shape == (50, 16) and not bank.keys.any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_clips": 0},
        {"num_clips": 4, "embedding_dim": 0},
        {"num_clips": 4, "momentum": 1.0},
        {"num_clips": 4, "momentum": -0.1},
        {"num_clips": 4, "momentum": math.nan},
        {"num_clips": 4, "keys": torch.zeros(3, 16, dtype=torch.uint8)},
        {"num_clips": 4, "keys": torch.zeros(4, 8, dtype=torch.uint8)},
    ],
)
def test_bank_refuses(arguments):
    with pytest.raises(ValueError, match="expected"):
        MemoryBank(**arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_update_row_by_row(momentum, dtype):
    bank = MemoryBank(10, 8, momentum=momentum)
    before = bank.vectors.clone()
    indices = torch.tensor([7, 0, 3])
    embeddings = unit(3, 8, seed=1, dtype=dtype)
    bank.update(indices, embeddings)
    expected = before.double().numpy()
    for row, embedding in zip(indices.tolist(), embeddings.double().numpy(), strict=True):
        mixed = [momentum * old + (1 - momentum) * new for old, new in zip(expected[row], embedding, strict=True)]
        length = math.sqrt(sum(value * value for value in mixed))
        expected[row] = [value / length for value in mixed]
    assert bank.vectors.dtype == torch.float32
    np.testing.assert_allclose(bank.vectors.numpy(), expected, atol=1e-6)
    untouched = [row for row in range(10) if row not in indices.tolist()]
    assert torch.equal(bank.vectors[untouched], before[untouched])


def test_update_takes_no_gradient_and_keeps_none():
    bank = MemoryBank(4, 8)
    bank.update(torch.tensor([1]), unit(1, 8).requires_grad_())
    assert not bank.vectors.requires_grad and list(bank.parameters()) == []


@pytest.mark.parametrize("seed", range(4))
def test_of_a_clip_that_occurs_twice_the_first_embedding_counts(seed):
    rng = np.random.default_rng(seed)
    # Ragged last batches are filled up from the batch's start; longer batches let an unstable sort show.
    indices = rng.integers(0, 12, 200)
    embeddings = unit(200, 8, seed=seed)
    bank, once = MemoryBank(12, 8, seed=seed), MemoryBank(12, 8, seed=seed)
    bank.update(torch.from_numpy(indices), embeddings)
    first = [int(np.flatnonzero(indices == row)[0]) for row in sorted(set(indices.tolist()))]
    shuffled = rng.permutation(first)  # without repeats the order is of no consequence
    once.update(torch.from_numpy(indices[shuffled]), embeddings[shuffled])
    torch.testing.assert_close(bank.vectors, once.vectors, rtol=0, atol=1e-7)


def test_update_normaliser_counts_the_first_estimate_whole():
    bank = MemoryBank(20, 4)
    bank.update_normaliser(torch.tensor(3.0, dtype=torch.float64), momentum=0.9)
    assert bank.Z.item() == pytest.approx(60)
    bank.update_normaliser(torch.tensor(5.0, dtype=torch.float64), momentum=0.9)
    assert bank.Z.item() == pytest.approx(0.9 * 60 + 0.1 * 100)
    bank.update_normaliser(torch.tensor(5.0, dtype=torch.float64))
    assert bank.Z.item() == pytest.approx(100)


def test_bank_file(tmp_path):
    keys = torch.arange(96, dtype=torch.uint8).view(6, 16)
    bank = MemoryBank(6, 8, keys=keys, seed=5)
    bank.update(torch.tensor([2]), unit(1, 8))
    large = math.exp(100) * 6  # beyond float32
    bank.update_normaliser(torch.tensor(math.exp(100), dtype=torch.float64))
    path = tmp_path / "memory_bank.safetensors"
    bank.save(path)
    state = load_file(path)
    assert set(state) == {"vectors", "Z", "keys"}
    assert (state["vectors"].dtype, state["Z"].dtype, state["keys"].dtype) == (
        torch.float32,
        torch.float64,
        torch.uint8,
    )
    again = MemoryBank.load(path, momentum=0.25)
    assert again.momentum == 0.25
    assert again.Z.item() == bank.Z.item() == pytest.approx(large)
    assert torch.equal(again.vectors, bank.vectors) and torch.equal(again.keys, keys)


BANK = {"vectors": torch.ones(3, 4), "Z": torch.zeros((), dtype=torch.float64), "keys": torch.zeros(3, 16).byte()}
NOT_BANKS = {
    "a model's weights": {"conv.weight": torch.ones(2)},
    "no Z": {name: tensor for name, tensor in BANK.items() if name != "Z"},
    "one tensor more": BANK | {"other": torch.ones(1)},
    "too few keys": BANK | {"keys": torch.zeros(2, 16).byte()},
    "vectors without rows": BANK | {"vectors": torch.ones(0, 4)},
    "one vector only": BANK | {"vectors": torch.ones(3)},
    "vectors of three dimensions": BANK | {"vectors": torch.ones(3, 4, 2)},
}


@pytest.mark.parametrize("what", [*NOT_BANKS, "truncated", "text", "empty"])
def test_load_names_a_file_that_is_no_bank(tmp_path, what):
    path = tmp_path / "other.safetensors"
    if what in NOT_BANKS:
        save_file(NOT_BANKS[what], path)
    else:
        save_file(BANK, path)
        path.write_bytes({"truncated": path.read_bytes()[:-10], "text": b"not a bank", "empty": b""}[what])
    with pytest.raises(ValueError, match=r"other\.safetensors is not a memory bank"):
        MemoryBank.load(path)


def estimate(objective, embeddings):
    """What the first global batch makes of Z: its mean over clip and negatives, times the clips, term by term."""
    (candidates,) = objective.candidates([torch.arange(len(embeddings))], [torch.arange(len(embeddings))], 8, 0)
    objective.bank.update_normaliser(objective.mean_exp(embeddings, candidates).mean())
    rows = objective.bank.vectors.double()
    pairs = [(row, j) for row, clip in enumerate(candidates.tolist()) for j in clip]
    values = [math.exp(float(rows[j] @ embeddings[row].double()) / objective.temperature) for row, j in pairs]
    return sum(values) / len(values) * len(rows)


@pytest.mark.parametrize("used_for", [0.07, 0.4, 1.0])
@pytest.mark.parametrize("earlier_says", ["its temperature", "softmax", "nothing"])
@pytest.mark.parametrize("order", ["taken over first", "objective first"])
def test_z_is_taken_over_for_its_own_temperature_only(tmp_path, earlier_says, used_for, order):
    path, keys = tmp_path / "memory_bank.safetensors", torch.arange(128, dtype=torch.uint8).view(8, 16)
    earlier = MemoryBank(6, 4, keys=keys[:6])
    objective = InstanceDiscrimination(earlier, "softmax" if earlier_says == "softmax" else "nce", 3, 0.4)
    if earlier_says != "softmax":
        estimate(objective, unit(6, 4))
    earlier.save(path)
    if earlier_says == "nothing":  # as files were written before they said it
        save_file(load_file(path), path)

    bank = MemoryBank(8, 4, keys=keys)
    steps = [lambda: bank.take_over(path), lambda: InstanceDiscrimination(bank, "nce", 3, used_for)]
    outcomes = [step() for step in (steps if order == "taken over first" else steps[::-1])]
    known, objective = outcomes if order == "taken over first" else outcomes[::-1]
    assert known == 6 and torch.equal(bank.vectors[:6], earlier.vectors)
    if earlier_says == "its temperature" and used_for == 0.4:
        assert bank.Z.item() == pytest.approx(earlier.Z.item() * 8 / 6) and not objective.needs_normaliser()
    else:
        assert bank.Z.item() == 0 and objective.needs_normaliser()
        expected = estimate(objective, unit(8, 4))
        assert bank.Z.item() == pytest.approx(expected, rel=1e-5)


def test_a_bank_goes_on_with_its_own_z_alone(tmp_path):
    """Saved and loaded, for the same temperature and for another; and a file from before it said which."""
    path, bank = tmp_path / "memory_bank.safetensors", MemoryBank(6, 4)
    estimate(InstanceDiscrimination(bank, temperature=0.1), unit(6, 4))
    bank.save(path)
    for temperature, kept in ((0.1, True), (0.2, False)):
        again = MemoryBank.load(path)
        assert again.Z.item() == bank.Z.item() > 0
        assert InstanceDiscrimination(again, temperature=temperature).needs_normaliser() != kept
        assert again.Z.item() == (bank.Z.item() if kept else 0)
    save_file(load_file(path), path)
    old = MemoryBank.load(path)
    assert old.Z.item() == bank.Z.item() and torch.equal(old.vectors, bank.vectors)
    assert InstanceDiscrimination(old, temperature=0.1).needs_normaliser()


# Health


def test_a_collapsed_bank_is_reported(caplog):
    bank = MemoryBank(200, 8)
    vectors = bank.vectors.double()
    mean = (vectors @ vectors.T).mean().item()
    assert bank_similarity(bank, 3) == pytest.approx(mean, rel=1e-6) and not caplog.text
    bank.vectors.copy_(F.normalize(unit(1, 8) + 0.1 * bank.vectors, dim=-1))
    assert bank_similarity(bank, 3) > 0.95
    assert "epoch 3: the embedding has collapsed" in caplog.text


def test_clips_that_were_not_visited_are_reported(caplog):
    visits = Visits(10, torch.device("cpu"), within_epoch=True)
    visits.add(torch.tensor([1, 2]))
    visits.end_epoch(1, expected=10)  # its beginning was another process's
    visits.add(torch.arange(10))
    visits.end_epoch(2, expected=10)
    visits.add(torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 9]))
    visits.end_epoch(3, expected=9)  # one clip waits where the last batch would have one clip
    assert not caplog.text
    visits.add(torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]))
    visits.end_epoch(4, expected=10)
    assert "epoch 4: 2 of 10 clips were never trained on" in caplog.text and "(first: 4, 9)" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert has_finite_weights(model)
    model[1].running_var[1] = value
    assert not has_finite_weights(model)


# Objectives


def slow_nce(vectors, embeddings, candidates, temperature, normaliser):
    """FACTS of the method, term by term: -[log P/(P + K Pn) + sum_k log K Pn/(P_k + K Pn)]."""
    N, K = len(vectors), candidates.shape[1] - 1
    noise = K * (1 / N)
    losses = []
    for embedding, row in zip(embeddings, candidates.tolist(), strict=True):
        probabilities = []
        for j in row:
            similarity = sum(embedding[d] * vectors[j, d] for d in range(len(embedding)))
            probabilities.append(torch.exp(similarity / temperature) / normaliser)
        loss = torch.log(probabilities[0] / (probabilities[0] + noise))
        for probability in probabilities[1:]:
            loss = loss + torch.log(noise / (probability + noise))
        losses.append(-loss)
    return torch.stack(losses)


@pytest.mark.parametrize("temperature", [0.07, 0.4, 1.0])
@pytest.mark.parametrize("num_negatives", [1, 7])
def test_nce_loss_and_gradients(num_negatives, temperature):
    bank = MemoryBank(30, 6)
    indices = torch.tensor([4, 29, 0])
    noise = torch.randint(30, (3, num_negatives), generator=generator())
    candidates = torch.cat([indices[:, None], noise], dim=1)
    embeddings = unit(3, 6, seed=1, dtype=torch.float64).requires_grad_()
    normaliser = torch.tensor(123.4, dtype=torch.float64)

    loss = nce_loss(nce_logits(bank, embeddings, candidates, temperature), normaliser, len(bank))
    (gradient,) = torch.autograd.grad(loss.sum(), embeddings)
    expected = slow_nce(bank.vectors.double(), embeddings, candidates, temperature, normaliser)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), embeddings)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)

    # float32, as in training
    single = nce_loss(nce_logits(bank, embeddings.detach().float(), candidates, temperature), normaliser, len(bank))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_nce_at_a_temperature_whose_exponential_overflows_float32():
    bank = MemoryBank(20, 6)
    embeddings = bank.vectors[:4].clone().requires_grad_()  # similarity 1: exp(100) is infinite in float32
    objective = InstanceDiscrimination(bank, num_negatives=16, temperature=0.01)
    (candidates,) = objective.candidates([torch.arange(4)], [torch.arange(4)], 4, 0)
    assert torch.isinf(torch.tensor(100.0).exp())
    mean = objective.mean_exp(embeddings, candidates).mean()
    assert mean.dtype == torch.float64 and math.isfinite(mean.item())
    bank.update_normaliser(mean)
    loss = objective(embeddings, torch.arange(4), candidates)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all() and torch.isfinite(embeddings.grad).all()
    expected = slow_nce(bank.vectors.double(), embeddings.detach().double(), candidates, 0.01, bank.Z)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_normaliser_is_the_mean_over_the_batch_and_its_candidates_times_the_clips():
    bank = MemoryBank(25, 6)
    objective = InstanceDiscrimination(bank, num_negatives=5, temperature=0.3)
    indices = torch.tensor([3, 8, 20])
    (candidates,) = objective.candidates([indices], [torch.arange(3)], 3, 0)
    embeddings = unit(3, 6, seed=2)
    assert objective.needs_normaliser()
    bank.update_normaliser(objective.mean_exp(embeddings, candidates).mean())
    assert not objective.needs_normaliser()
    values = []
    for embedding, row in zip(embeddings.double(), candidates.tolist(), strict=True):
        values += [math.exp(float(bank.vectors[j].double() @ embedding) / 0.3) for j in row]
    assert bank.Z.item() == pytest.approx(sum(values) / len(values) * 25, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.4])
@pytest.mark.parametrize("exclude_positive", [False, True])
def test_running_normaliser_is_unbiased(exclude_positive, temperature):
    """Over many draws, the exact sum over all rows; with clips that resemble their own rows, as after training."""
    clips, num_negatives = 60, 8
    bank = MemoryBank(clips, 16, seed=1)
    objective = InstanceDiscrimination(bank, "nce", num_negatives, temperature, exclude_positive, z_momentum=0.9)
    indices = torch.arange(0, clips, 6)
    embeddings = F.normalize(bank.vectors[indices] + 0.03 * unit(len(indices), 16, seed=2), dim=-1)
    exact = []
    for embedding in embeddings.double():
        exact.append(sum(math.exp(float(row @ embedding) / temperature) for row in bank.vectors.double()))
    places = torch.arange(len(indices))
    draws = [
        objective.mean_exp(embeddings, objective.candidates([indices], [places], len(places), step)[0])
        for step in range(4000)
    ]
    per_clip = torch.stack(draws) * clips
    error = per_clip.std(dim=0) / len(draws) ** 0.5
    assert ((per_clip.mean(dim=0) - torch.tensor(exact, dtype=torch.float64)).abs() < 4 * error).all()
    # And so is what the bank keeps of them, in the mean over the second half.
    estimates = []
    for draw in draws:
        bank.update_normaliser(draw.mean(), objective.z_momentum)
        estimates.append(bank.Z.item())
    assert np.mean(estimates[2000:]) == pytest.approx(np.mean(exact), rel=0.01)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.4])
def test_softmax_loss_and_gradients(temperature):
    bank = MemoryBank(12, 6)
    indices = torch.tensor([11, 0, 5, 5])
    embeddings = unit(4, 6, seed=1, dtype=torch.float64).requires_grad_()
    loss = softmax_loss(bank, embeddings, indices, temperature)
    expected = []
    for embedding, index in zip(embeddings, indices.tolist(), strict=True):
        scores = [sum(row[d] * embedding[d] for d in range(6)) / temperature for row in bank.vectors.double()]
        largest = max(score.item() for score in scores)
        total = sum(torch.exp(score - largest) for score in scores)
        expected.append(-(scores[index] - largest - torch.log(total)))
    expected = torch.stack(expected)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), embeddings, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), embeddings)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)

    objective = InstanceDiscrimination(bank, "softmax", temperature=temperature)
    assert not objective.needs_normaliser()
    assert objective.candidates([indices, indices], [torch.arange(4)] * 2, 4, 0) == [None, None]
    torch.testing.assert_close(objective(embeddings, indices, None), loss)
    single = embeddings.detach().float()
    torch.testing.assert_close(
        softmax_loss(bank, single, indices, temperature).double(), loss.detach(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("arguments", [{"objective": "infonce"}, {"bank": MemoryBank(1, 4), "exclude_positive": True}])
def test_objective_refuses(arguments):
    with pytest.raises(ValueError):
        InstanceDiscrimination(**{"bank": MemoryBank(4, 4), **arguments})


# Candidates


@pytest.mark.parametrize("exclude_positive", [False, True])
def test_candidates_are_the_clip_and_then_uniform_noise(exclude_positive):
    clips, batch, num_negatives = 6, 30, 2000
    objective = InstanceDiscrimination(
        MemoryBank(clips, 4), num_negatives=num_negatives, exclude_positive=exclude_positive
    )
    indices = torch.arange(batch) % clips
    (candidates,) = objective.candidates([indices], [torch.arange(batch)], batch, 0)
    assert candidates.dtype == torch.int64 and candidates.shape == (batch, 1 + num_negatives)
    assert torch.equal(candidates[:, 0], indices)
    noise = candidates[:, 1:]
    assert noise.min() == 0 and noise.max() == clips - 1
    for clip in range(clips):
        drawn = torch.bincount(noise[indices == clip].flatten(), minlength=clips).double()
        expected = torch.full((clips,), drawn.sum().item() / (clips - exclude_positive), dtype=torch.float64)
        if exclude_positive:
            expected[clip] = 0
            assert drawn[clip] == 0
        # 10,000 draws: seven standard deviations of a count
        assert (drawn - expected).abs().max() < 7 * expected.max().sqrt()


@pytest.mark.parametrize("exclude_positive", [False, True])
def test_candidates_do_not_depend_on_how_the_global_batch_is_split(exclude_positive):
    objective = InstanceDiscrimination(MemoryBank(50, 4), num_negatives=9, exclude_positive=exclude_positive, seed=7)
    indices, places = torch.randperm(50, generator=generator())[:16], torch.arange(16)
    (whole,) = objective.candidates([indices], [places], 16, step=3)
    accumulated = objective.candidates(list(indices.split(4)), list(places.split(4)), 16, step=3)
    assert torch.equal(torch.cat(accumulated), whole)
    # Two processes with two batches of four each: the first has places 0..3 and 8..11.
    for process in range(2):
        own = torch.cat([places[first : first + 4] for first in (4 * process, 8 + 4 * process)])
        parts = objective.candidates(list(indices[own].split(4)), list(own.split(4)), 16, step=3)
        assert torch.equal(torch.cat(parts), whole[own])


def test_candidates_depend_on_seed_and_step_alone():
    def drawn(seed, step):
        torch.manual_seed(seed * 31 + step * 17)  # the global state has no say, and is left as it was
        objective = InstanceDiscrimination(MemoryBank(1000, 4), num_negatives=9, seed=seed)
        state = torch.get_rng_state()
        (candidates,) = objective.candidates([torch.arange(8)], [torch.arange(8)], 8, step)
        assert torch.equal(torch.get_rng_state(), state)
        return candidates

    first = drawn(1, 5)
    torch.rand(3)
    assert torch.equal(drawn(1, 5), first)
    # Neither may one be swapped for the other.
    others = [drawn(1, 6), drawn(2, 5), drawn(5, 1)]
    assert all(not torch.equal(other[:, 1:], first[:, 1:]) for other in others)


# Weighted k-NN


def slow_knn(queries, references, labels, num_classes, k, sigma):
    predictions = []
    for query in queries.double().numpy():
        ranked = sorted(
            ((float(query @ reference), int(label)) for reference, label in zip(references, labels, strict=True)),
            reverse=True,
        )[:k]
        votes = [0.0] * num_classes
        for similarity, label in ranked:
            # Relative to the nearest: exp(1 / 0.001) is infinite even in float64.
            votes[label] += math.exp((similarity - ranked[0][0]) / sigma)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("sigma", [0.001, 0.01, 0.4, 100.0])
@pytest.mark.parametrize(("num_classes", "k"), [(2, 1), (10, 5), (3, 40), (10, 1000)])
def test_weighted_knn(num_classes, k, sigma):
    references, queries = unit(40, 8, seed=1), unit(23, 8, seed=2)
    labels = torch.randint(num_classes, (40,), generator=generator())
    expected = slow_knn(queries, references.double().numpy(), labels, num_classes, k, sigma)
    for chunk_size in (1, 7, 23, 4096):
        predicted = weighted_knn(queries, references, labels, num_classes, k, sigma, chunk_size)
        assert predicted.dtype == torch.int64
        assert predicted.tolist() == expected


def test_weighted_knn_is_no_majority_vote_and_no_nearest_neighbour():
    query = torch.tensor([[1.0, 0.0]])
    angles = torch.tensor([0.0, 0.5, 0.6])
    references = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([1, 0, 0])
    assert weighted_knn(query, references, labels, 2, k=3, sigma=0.01).tolist() == [1]  # the nearest outweighs two
    assert weighted_knn(query, references, labels, 2, k=3, sigma=10).tolist() == [0]  # almost equal votes


def test_runs_of_any_temperature_are_measured_alike(sound_folder, monkeypatch):
    """The same embeddings have the same accuracy."""
    embeddings, corpora = unit(40, 8), [("audiofolder", load_corpus("audiofolder", sound_folder))]
    monkeypatch.setattr(NearestNeighbourTests, "embed", lambda *_: embeddings)
    labels, folds = (torch.tensor(corpora[0][1][name][:]) for name in ("label", "fold"))
    hits = []
    for fold in (1, 2):
        query = folds == fold
        references = embeddings[~query].double().numpy()
        predicted = torch.tensor(slow_knn(embeddings[query], references, labels[~query], 4, 15, 0.1))
        hits.append((predicted == labels[query]).double().mean().item())
    for temperature in ("0.001", "0.1", "10"):
        args = PretrainingSettings(nce_t=temperature, knn_k=15, dataloader_num_workers=0)
        extractor = ESResNetFeatureExtractor.from_preset("tiny", max_length=4000, audio_channels=1)
        store = ClipStore([clips for _, clips in corpora], extractor, args)
        tests = NearestNeighbourTests(args, corpora, store, ViewMaker(extractor), Accelerator(cpu=True))
        assert tests(torch.nn.Identity()) == {"audiofolder": pytest.approx(np.mean(hits))}


def test_weighted_knn_has_one_sigma_whatever_the_temperature():
    references, queries = unit(40, 8, seed=1), unit(23, 8, seed=2)
    labels = torch.randint(10, (40,), generator=generator())
    expected = slow_knn(queries, references.double().numpy(), labels, 10, 5, 0.1)
    assert weighted_knn(queries, references, labels, 10).tolist() == expected
    assert expected != slow_knn(queries, references.double().numpy(), labels, 10, 5, 0.4)


@pytest.mark.parametrize("chunk_size", [1, 4096])
def test_weighted_knn_without_queries(chunk_size):
    predicted = weighted_knn(torch.empty(0, 4), unit(5, 4), torch.arange(5), 5, chunk_size=chunk_size)
    assert predicted.shape == (0,) and predicted.dtype == torch.int64


def test_knn_accuracy_by_fold():
    embeddings, folds = unit(60, 6), torch.arange(60) % 4 + 1
    labels = torch.randint(3, (60,), generator=generator(1))
    accuracies = knn_accuracy_by_fold(embeddings, labels, folds, [2, 4], k=3, sigma=0.2)
    assert list(accuracies) == [2, 4]
    for fold in (2, 4):
        inside, outside = (folds == fold).nonzero().flatten(), (folds != fold).nonzero().flatten()
        predicted = slow_knn(embeddings[inside], embeddings[outside].double().numpy(), labels[outside], 3, 3, 0.2)
        hits = sum(p == label for p, label in zip(predicted, labels[inside].tolist(), strict=True))
        assert accuracies[fold] == pytest.approx(hits / len(inside))


def test_knn_accuracy_with_a_class_that_is_in_the_held_out_fold_alone():
    embeddings = unit(6, 4)
    accuracies = knn_accuracy_by_fold(
        embeddings, torch.tensor([0, 1, 0, 1, 2, 2]), torch.tensor([1, 1, 1, 1, 2, 2]), [2], k=5, sigma=0.4
    )
    assert accuracies == {2: 0.0}


# One optimizer step, however it is split


def noises(num_clips):
    """Noise of different lengths, as a corpus."""
    return rows_of([encoded(noise(3000 + 200 * i, seed=i), 44100) for i in range(num_clips)], 44100)


def pretext(tmp_path, batch_size, accumulation, num_clips=8, training=False, rows=None, **objective):
    """A step over a tiny network, with batch norm in evaluation mode unless `training`, and its loop and bank.

    Of noise and its waveforms' augmentation; or of `rows`, kept spectrograms with the recommended augmentation.
    """
    torch.manual_seed(0)
    config = ESResNetConfig.from_preset("tiny", embedding_dim=8)
    model = ESResNetForInstanceDiscrimination(config).train(training)
    args = SimpleNamespace(
        seed=0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=1e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        keep_spectrograms=rows is not None,
        keep_waveforms=False,
        cache_gigabytes=1.0,
        dataloader_num_workers=0,
        memory_format="auto",
        num_threads=1,
        clip_seconds=0.1,
        audio_channels=1,
        num_train_epochs=2,
        max_train_steps=None,
        checkpointing_steps="epoch",
        checkpoints_total_limit=1,
        augmentation="waveform" if rows is None else "spectrogram",
        augmentation_strength=1.0,
    )
    extractor = ESResNetFeatureExtractor.from_preset("tiny", max_length=4000, audio_channels=1)
    clips = noises(num_clips) if rows is None else rows
    store = ClipStore([clips], extractor, args)
    loader = training_loader(store, clips, args)
    accelerator = Accelerator(cpu=True)
    loop = TrainingLoop(args, accelerator, model, loader, lambda folder: None, tmp_path, None, Record())
    bank = MemoryBank(len(clips), 8)
    pretext_task = InstanceDiscrimination(bank, num_negatives=4, **objective)
    make_views = ViewMaker(extractor, args.augmentation, from_spectrograms=store.caches_spectrograms)
    step = PretextStep(accelerator, loop, pretext_task, make_views)
    return step, loop, bank


@pytest.fixture
def counted_updates(monkeypatch):
    calls = []
    update = MemoryBank.update

    def count(self, indices, embeddings):
        calls.append(indices.tolist())
        update(self, indices, embeddings)

    monkeypatch.setattr(MemoryBank, "update", count)
    return calls


@pytest.mark.parametrize("num_clips", [8, 14])  # 14: a second global batch of 6, split 4 + 2
@pytest.mark.parametrize("objective", [{}, {"z_momentum": 0.5}, {"objective": "softmax"}])
def test_accumulated_batches_are_one_batch(tmp_path, objective, num_clips, counted_updates):
    outcomes = []
    for batch_size, accumulation in ((8, 1), (4, 2)):
        counted_updates.clear()
        step, loop, bank = pretext(tmp_path, batch_size, accumulation, num_clips, **objective)
        losses = []
        for batch in loop.global_batches():
            losses.append(step(batch).item())
            # As the loop does.
            loop.progress.step += 1
            loop.progress.batches += len(batch.batches)
        assert [len(indices) for indices in counted_updates] == ([8] if num_clips == 8 else [8, 6])
        outcomes.append((losses, loop.model.state_dict(), bank.state_dict(), list(counted_updates)))
    (losses, weights, bank, updates), (split_losses, split_weights, split_bank, split_updates) = outcomes
    assert updates == split_updates
    assert losses == pytest.approx(split_losses, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(split_weights[name], tensor, rtol=1e-4, atol=1e-6)
    for name in ("vectors", "Z"):
        torch.testing.assert_close(split_bank[name], bank[name], rtol=1e-5, atol=1e-5)
    start = MemoryBank(num_clips, 8).vectors
    assert (bank["vectors"] - start).norm(dim=-1).min() > 1e-3  # every clip's row moved


@pytest.mark.parametrize(
    "objective", [{}, {"temperature": 0.1, "z_momentum": 0.9}, {"objective": "softmax", "temperature": 0.1}]
)
def test_pretraining_with_mixed_spectrograms_does_not_depend_on_the_split(tmp_path, monkeypatch, objective):
    """Batches of 32, or 16 and 16 accumulated: two epochs of 70 clips, of which each batch's last are fewer."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lengths = [300 + 7 * clip for clip in range(70)]
    rows = make_rows(lengths)
    outcomes = []
    for batch_size, accumulation in ((32, 1), (16, 2)):
        output_dir = tmp_path / f"{batch_size}"
        step, loop, bank = pretext(output_dir, batch_size, accumulation, rows=rows, **objective)
        before = {name: parameter.detach().clone() for name, parameter in loop.model.named_parameters()}
        loop.train(step, lambda epoch, is_last: {})
        losses = [entry["loss"] for entry in loop.progress.history]
        assert loop.progress.step == 6 and len(losses) == 2
        assert not any(torch.equal(parameter, before[name]) for name, parameter in loop.model.named_parameters())
        outcomes.append((losses, loop.model.state_dict(), bank.state_dict()))
    (losses, weights, bank), (split_losses, split_weights, split_bank) = outcomes
    assert losses == pytest.approx(split_losses, rel=1e-5)
    for whole, split in ((weights, split_weights), (bank, split_bank)):
        for name, tensor in whole.items():
            torch.testing.assert_close(split[name], tensor, rtol=1e-5, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_step_moves_the_network_along_the_mean_gradient(tmp_path):
    step, loop, bank = pretext(tmp_path, 4, 2, objective="softmax")
    (batch,) = loop.global_batches()
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    losses = []
    for part in batch.batches:
        embeddings = loop.model(step.make_views(part)).embeddings
        losses += softmax_loss(bank, embeddings, part["index"], 0.4).unbind()
    gradients = torch.autograd.grad(sum(losses) / 8, list(loop.model.parameters()))
    total = step(batch)
    assert total.item() == pytest.approx(sum(loss.item() for loss in losses), rel=1e-5)
    for (name, parameter), gradient in zip(loop.model.named_parameters(), gradients, strict=True):
        expected = before[name] - 0.1 * (gradient + 1e-4 * before[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (1, 7)])
def test_first_normaliser_does_not_depend_on_the_split(tmp_path, sizes):
    step, loop, bank = pretext(tmp_path, 8, 1)
    (batch,) = loop.global_batches()
    views = step.make_views(batch.batches[0])
    candidates = step.objective.candidates([batch.batches[0]["index"]], batch.places, batch.slots, 0)
    step.estimate_normaliser(batch, [views], candidates)
    whole = bank.Z.item()
    bank.Z.zero_()
    batch.places = batch.places[0].split(sizes)
    step.estimate_normaliser(batch, views.split(sizes), candidates[0].split(sizes))
    assert bank.Z.item() == pytest.approx(whole, rel=1e-5)


def test_first_normaliser_leaves_batch_norm_statistics_alone(tmp_path):
    step, loop, bank = pretext(tmp_path, 8, 1, training=True)
    (batch,) = loop.global_batches()
    before = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    views = [torch.randn(4, 1, 3, 32, 64), torch.randn(4, 1, 3, 32, 64)]
    places = [torch.arange(4), torch.arange(4, 8)]
    candidates = step.objective.candidates([torch.arange(4)] * 2, places, 8, 0)
    step.estimate_normaliser(dataclasses.replace(batch, places=places), views, candidates)
    assert bank.Z.item() > 0
    for name, tensor in loop.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    step(batch)  # and a step does move them
    running = "running_mean"
    assert any(
        running in name and not torch.equal(tensor, before[name]) for name, tensor in loop.model.state_dict().items()
    )


def test_normaliser_is_estimated_once_or_kept_running(tmp_path):
    for z_momentum in (None, 0.5):
        step, loop, bank = pretext(tmp_path, 4, 1, z_momentum=z_momentum)
        estimates = []
        for batch in loop.global_batches():
            step(batch)
            estimates.append(bank.Z.item())
        assert (estimates[0] == estimates[1]) == (z_momentum is None)


def test_clips_that_fill_up_a_ragged_batch_do_not_count_in_the_loss(tmp_path):
    _, loop, _ = pretext(tmp_path, 8, 1)
    weight = next(loop.model.parameters())
    first = weight.detach().flatten()[0].item()
    losses = torch.arange(1.0, 9.0)
    batch = GlobalBatch([{}], [torch.arange(8)], slots=8, clips=6, step=0)
    loss_sum = loop.optimize(batch, lambda _: losses * weight.flatten()[0])
    assert loss_sum.item() == pytest.approx(21 * first)
    # The mean over the six clips that count, at learning rate 0.1, with weight decay.
    assert weight.flatten()[0].item() == pytest.approx(first - 0.1 * (21 / 6 + 1e-4 * first), rel=1e-5)


def test_going_on_within_an_epoch_gives_its_remaining_batches(tmp_path):
    _, loop, _ = pretext(tmp_path, 4, 1, num_clips=14)

    def remaining(epoch, batches):
        loop.progress.epoch, loop.progress.batches = epoch, batches
        seen = []
        for batch in loop.global_batches():
            seen.append((batch.batches[0]["index"].tolist(), batch.places[0].tolist(), batch.clips))
            loop.progress.batches += 1
        return seen

    whole = remaining(epoch=2, batches=0)
    assert [clips for _, _, clips in whole] == [4, 4, 4, 2]
    assert remaining(epoch=2, batches=2) == whole[2:]
    assert remaining(epoch=0, batches=0) != whole
