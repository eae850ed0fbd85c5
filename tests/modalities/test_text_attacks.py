"""Words replaced and vectors moved. Oracles: all combinations of substitutions, finite differences, one text alone."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_texts import LISTED, learned, tiny
from torch import Tensor, nn

from sparring.attacks.catalogue import frank_wolfe, pgd
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.evaluation.measure import measure
from sparring.modalities import find
from sparring.modalities.text.data import Texts
from sparring.modalities.text.genetic import genetic
from sparring.modalities.text.misspellings import misspellings
from sparring.modalities.text.models import TEXT_MODELS
from sparring.modalities.text.search import full_search, greedy
from sparring.modalities.text.threats import EmbeddingBall, Substitutions
from sparring.modalities.text.tokens import tokens_of
from sparring.threats import check_threat, inside

KIND = find("text")
OURS = [name for name in TEXT_MODELS if name != "transformers"]  # which is somebody else's, with tests of its own


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def networks(data: Texts) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    given = {"vocabulary": data.facts["vocabulary"], "num_classes": 2, "vector_size": None}
    shape: Any = {"transformer-small": {"shape": data.shape}}
    made = {name: TEXT_MODELS[name](**given, **shape.get(name, {}), size=8, hidden=8).eval() for name in OURS}
    return {name: learned(net, data, 25) if name in ("bag", "cnn-text") else net for name, net in made.items()}


def words(data: Texts, text: str = "words:1.0") -> Substitutions:
    threat = KIND.make_threat(text, data)
    assert isinstance(threat, Substitutions)
    return threat


def some(data: Texts, count: int = 6) -> dict[str, Tensor]:
    return {name: tensor[:count] for name, tensor in data.x_test.items()}  # type: ignore[union-attr]


def crowded(data: Texts, places: int = 5) -> tuple[dict[str, Tensor], Tensor]:
    """Texts of many words that have substitutes, so that budgets and searches have something to choose from."""
    draw = torch.Generator().manual_seed(1)
    listed = torch.tensor(data.lexicon.numbers(LISTED))
    ids = listed[torch.randint(len(listed), (12, places), generator=draw)]
    mask = torch.arange(places) < torch.randint(places // 2, places + 1, (12, 1), generator=draw)
    return {"ids": ids * mask, "mask": mask}, torch.arange(12) % 2


@pytest.mark.parametrize("text", ["words:1.0", "words:0.4", "words:1,k=1"])
def test_words_keep_the_contract(text: str, data: Texts) -> None:
    x = crowded(data, 9)[0]
    check_threat(words(data, text), x, num_directions=30)
    radius = torch.linspace(0.2, 1, 12)
    threat = words(data, text)
    check_threat(Substitutions(radius, threat.table, threat.allowed, threat.lexicon), x, num_directions=30)


@pytest.mark.parametrize("per", ["sequence", "token"])
def test_moved_vectors_keep_the_contract(per: Any, data: Texts, networks: dict[str, nn.Module]) -> None:
    threat = KIND.make_threat(f"embedding:0.5,per={per}", data, networks["bag"])
    assert isinstance(threat, EmbeddingBall) and threat.unit == float(networks["bag"].token_norm)
    check_threat(threat, some(data), num_directions=30)
    again = KIND.make_threat(threat.text(), data, networks["bag"])
    assert again.text() == threat.text() and words(data, "words:0.4,k=1").text() == "words:0.4,k=1"
    found = pgd(threat, num_steps=3)(networks["bag"], some(data), data.y_test[:6])
    offset = found.x_adv["offset"].norm(dim=2)  # type: ignore[index]
    length = offset.norm(dim=1) if per == "sequence" else offset.amax(1)
    assert (length <= 0.5 * threat.unit * 1.0001).all() and (found.x_adv["offset"][~some(data)["mask"]] == 0).all()  # type: ignore[index]


def test_the_table_is_the_list(data: Texts) -> None:
    threat, number = words(data), data.lexicon.number_of
    for word, others in LISTED.items():
        row = threat.table[number[word]][threat.allowed[number[word]]]
        assert [data.lexicon.words[i] for i in row.tolist()] == others.split()
    assert int(threat.allowed.any(1).sum()) == len(LISTED)
    assert words(data, "words:1,k=1").allowed.sum() == len(LISTED)


def all_forms(threat: Substitutions, x: dict[str, Tensor], row: int) -> Tensor:
    """(n, L) every text that the threat permits around one."""
    one = {name: tensor[row : row + 1] for name, tensor in x.items()}
    per_place = [
        [int(i)] + [int(j) for j, there in zip(threat.table[i], threat.allowed[i], strict=True) if there and m]
        for i, m in zip(one["ids"][0], one["mask"][0], strict=True)
    ]
    changeable = sum(len(choice) > 1 for choice in per_place)
    most = int(float(threat.radius) * changeable + 1e-6)
    forms = torch.tensor(list(itertools.product(*per_place)))
    return forms[(forms != one["ids"]).sum(1) <= most]


@pytest.mark.parametrize(("name", "share", "least"), [("bag", 1.0, 0.7), ("bag", 0.5, 0.7), ("cnn-text", 1.0, 0.5)])
def test_searches_against_all_combinations(name: str, share: float, least: float, data: Texts) -> None:
    threat = words(data, f"words:{share}")
    x, y = crowded(data)
    torch.manual_seed(5)
    network = TEXT_MODELS[name](data.facts["vocabulary"], 2, None, size=8, hidden=8).eval()
    with torch.no_grad():
        network.words.weight.mul_(5)  # type: ignore[operator, union-attr]
        start = margin.score(network(x), y)
        network.head[2].bias[0] += 3 * float(start.abs().max())  # type: ignore[index, union-attr, operator]
        y = torch.zeros_like(y)  # so sure that no text falls, and searches go on to the end
        exact = []
        for row in range(len(y)):
            forms = all_forms(threat, x, row)
            shown = {"ids": forms, "mask": x["mask"][row].expand(len(forms), -1)}
            exact.append(margin.score(network(shown), y[row].expand(len(forms))).max())
        best, start = torch.stack(exact), margin.score(network(x), y)
    assert (best < 0).all() and (best > start + 1e-4).any()
    found = {}
    for attack_name, attack in {
        "greedy": greedy(threat), "by gradient": greedy(threat, rank="gradient"), "full": full_search(threat),
        "genetic": genetic(threat, num_generations=8, population=8),
        "frank-wolfe": frank_wolfe(threat, num_steps=5, objective=margin),
    }.items():  # fmt: skip
        result = attack(network, x, y)
        assert bool(threat.valid(x, result.x_adv).all()) and bool(inside(threat, x, result.z).all())
        score = margin.score(network(result.x_adv), y).detach()
        assert torch.allclose(score, result.loss, atol=1e-5)  # type: ignore[arg-type]
        assert (score <= best + 1e-5).all() and (score >= start - 1e-5).all()
        found[attack_name] = score
    gained = {key: float((score - start).sum() / (best - start).sum()) for key, score in found.items()}
    assert gained["full"] > least and gained["full"] >= gained["greedy"] - 1e-3 and gained["greedy"] > least, gained
    assert gained["genetic"] > 0.9, gained
    neighbours = greedy_neighbours(threat, network, x, y, full_search(threat)(network, x, y).x_adv)
    assert (neighbours <= found["full"] + 1e-5).all()  # it ends where no single change helps


def greedy_neighbours(threat: Substitutions, network: nn.Module, x: Any, y: Tensor, x_adv: Any) -> Tensor:
    """(B,) the best score of texts that differ in one word from those found."""
    best = []
    for row in range(len(y)):
        forms = all_forms(threat, x, row)
        near = forms[(forms != x_adv["ids"][row]).sum(1) <= 1]
        best.append(
            margin.score(
                network({"ids": near, "mask": x["mask"][row].expand(len(near), -1)}), y[row].expand(len(near))
            ).max()
        )
    return torch.stack(best).detach()


def test_one_frank_wolfe_step_ranks_by_finite_differences(data: Texts, networks: dict[str, nn.Module]) -> None:
    threat, (x, y) = words(data), crowded(data)
    network = networks["cnn-text"].double()
    z = threat.null(x).double().requires_grad_()
    grad = torch.autograd.grad(margin.score(network(threat.apply(x, z)), y).sum(), z)[0]
    step, base = 1e-6, margin.score(network(threat.apply(x, threat.null(x).double())), y)
    for place, number in itertools.product(range(z.shape[1]), range(z.shape[2])):
        moved = threat.null(x).double()
        moved[:, place, number] = step * threat.open(x)[:, place, number]
        rise = (margin.score(network(threat.apply(x, moved)), y) - base) / step
        expected = grad[:, place, number] * threat.open(x)[:, place, number]
        assert torch.allclose(rise, expected, atol=1e-4)
    picked = threat.corner(x, grad)
    gain = grad.where(threat.open(x), -torch.inf).amax(2).clamp_min(0)
    assert torch.allclose((picked * grad).flatten(1).sum(1), gain.sum(1))  # share 1: each word's best, where it gains
    half = words(data, "words:0.5").corner(x, grad)
    top = torch.stack(
        [
            g.sort(descending=True).values[: int(b)].sum()
            for g, b in zip(gain, words(data, "words:0.5").budget(x), strict=True)
        ]
    )
    assert torch.allclose((half * grad).flatten(1).sum(1), top)
    network.float()


@pytest.mark.parametrize("name", OURS)
def test_padding_never_counts(name: str, data: Texts, networks: dict[str, nn.Module]) -> None:
    network, x = networks[name], some(data)
    longer = {key: nn.functional.pad(tensor, (0, 3)) for key, tensor in x.items()}
    junk = {**longer, "ids": longer["ids"].where(longer["mask"], 7)}
    if name == "transformer-small":  # it has no place beyond the longest
        junk = {key: tensor[:, : x["ids"].shape[1]] for key, tensor in junk.items()}
    assert torch.allclose(network(x), network(junk), atol=1e-5)
    one = torch.cat([network({key: tensor[i : i + 1] for key, tensor in x.items()}) for i in range(6)])
    assert torch.allclose(network(x), one, atol=1e-5)
    beyond = {**x, "ids": x["ids"] + 10_000 * x["mask"]}
    unknown = {**x, "ids": torch.where(x["mask"], 1, 0)}
    assert torch.allclose(network(beyond), network(unknown), atol=1e-6)  # numbers that no model has seen


@pytest.mark.parametrize("name", OURS)
def test_mixtures_at_corners_are_the_texts(name: str, data: Texts, networks: dict[str, nn.Module]) -> None:
    threat, x = words(data), some(data)
    z = threat.sample(x, Noise.make(0, "test", torch.arange(6)))
    assert int((threat.realize(x, z)["ids"] != x["ids"]).sum()) > 6
    network = networks[name]
    assert torch.allclose(network(threat.apply(x, z)), network(threat.realize(x, z)), atol=1e-5)


def test_soft_points_become_the_text_of_what_holds_most(data: Texts) -> None:
    x, threat = crowded(data)[0], words(data, "words:0.5")
    z = threat.null(x)
    z[0, 0, 1], z[0, 1, 0] = 0.6, 0.55
    z[1, 0, 0] = 0.4
    real = threat.realize(x, z)["ids"]
    changed = real != x["ids"]
    assert int(threat.budget(x)[0]) >= 1 and bool(changed[0, 0]) and not bool(changed[1].any())
    assert int(changed[0].sum()) == min(2, int(threat.budget(x)[0])) and real[0, 0] == threat.table[x["ids"][0, 0], 1]


def test_attacks_do_to_one_text_what_they_do_to_many(data: Texts, networks: dict[str, nn.Module]) -> None:
    threat, network = words(data, "words:0.6"), networks["cnn-text"]
    x, y = crowded(data)
    noise = Noise.make(3, "test", torch.arange(len(y)))
    for make in (greedy, full_search, genetic, frank_wolfe):
        whole = make(threat)(network, x, y, noise=noise)
        for i in range(0, 12, 5):
            alone = {name: tensor[i : i + 1] for name, tensor in x.items()}
            one = make(threat)(network, alone, y[i : i + 1], noise=noise.take(torch.tensor([i])))
            assert torch.equal(one.x_adv["ids"][0], whole.x_adv["ids"][i])  # type: ignore[index]


@pytest.mark.parametrize("make", [greedy, full_search, genetic])
def test_texts_of_many_lengths_are_searched_as_alone(make: Any, data: Texts, networks: dict[str, nn.Module]) -> None:
    threat, network = words(data, "words:0.6"), networks["cnn-text"]
    known = threat.allowed.any(1).nonzero()[:, 0]
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 8, 9, 17, 40, 4, 25, 16])
    mask = torch.arange(40) < lengths[:, None]
    ids = known[torch.randint(len(known), mask.shape, generator=draw)] * mask
    y, noise = network({"ids": ids, "mask": mask}).argmax(1), Noise.make(3, "test", torch.arange(8))
    whole = make(threat)(network, {"ids": ids, "mask": mask}, y, noise=noise)
    forwards = 0
    for i in range(8):
        alone = {"ids": ids[i : i + 1], "mask": mask[i : i + 1]}
        one = make(threat)(network, alone, y[i : i + 1], noise=noise.take(torch.tensor([i])))
        assert torch.equal(one.x_adv["ids"][0], whole.x_adv["ids"][i])
        torch.testing.assert_close(one.loss[0], whole.loss[i])
        forwards += one.cost.forwards
    assert forwards == whole.cost.forwards


def test_published_attacks_by_name(data: Texts, networks: dict[str, nn.Module]) -> None:
    x, y = crowded(data)
    for name, kind in {"textfooler": "words", "a2t": "words", "hotflip": "words", "deepwordbug": "characters"}.items():
        (stage,) = KIND.make_plan(name, words(data, f"{kind}:0.6"))
        assert stage(words(data, f"{kind}:0.6"))(networks["bag"], x, y).reached.shape == y.shape  # type: ignore[union-attr]
    (stage,) = KIND.make_plan("alzantot", words(data))
    assert str(stage) == "genetic:num_generations=20,population=60"
    with pytest.raises(ValueError, match="changes characters; take --threat characters:SHARE"):
        KIND.make_plan("deepwordbug", words(data))


@pytest.mark.parametrize("options", [{"num_generations": 0}, {"population": 1}])
def test_a_population_needs_members(options: dict[str, int], data: Texts) -> None:
    with pytest.raises(ValueError, match="expected at least 1 generation of at least 2"):
        genetic(words(data), **options)


def test_an_evaluation_counts_what_holds(data: Texts, networks: dict[str, nn.Module]) -> None:
    network, threat = networks["bag"], words(data)
    found = {
        plan: measure(network, data.batches("test", 16, 16), threat, KIND.make_plan(plan, threat))
        for plan in ("fast", "full")
    }
    assert found["full"].robust.value <= found["fast"].robust.value < found["fast"].clean.value
    for evaluation in found.values():
        names = [attack.name for attack in evaluation.attacks]
        assert names[0].startswith("frank-wolfe") and any(a.cost.backwards == 0 for a in evaluation.attacks if a.ran_on)
        assert not any(sum(a.rejected.values()) for a in evaluation.attacks), evaluation.findings
        assert [radius for radius, _ in evaluation.curve] == [0, 0.25, 0.5, 0.75, 1]  # all words are all words
        values = [share.value for _, share in evaluation.curve]
        assert values == sorted(values, reverse=True)
    ball = KIND.make_threat("embedding:5", data, network)
    assert str(KIND.make_plan("fast", ball)[0]).startswith("pgd")
    found["ball"] = measure(network, data.batches("test"), ball, KIND.make_plan("fgsm,pgd:num_steps=5", ball), curve=())
    assert found["ball"].robust.value < found["ball"].clean.value


def test_misspelled_texts_are_read_back_as_what_they_were_made_of(data: Texts, networks: dict[str, nn.Module]) -> None:
    threat = words(data, "characters:0.5,k=6")
    x, network = some(data, 30), networks["bag"]
    check_threat(threat, some(data, 6), num_directions=30)
    result = greedy(threat)(network, x, data.y_test[:30])
    changed = result.x_adv["ids"] != x["ids"]  # type: ignore[index]
    assert int(changed.sum()) > 10 and float(result.reached.float().mean()) > 0.1  # type: ignore[union-attr]
    gallery = {"index": torch.arange(30).numpy(), "x/ids": x["ids"].numpy(), "x_adv/ids": result.x_adv["ids"].numpy()}  # type: ignore[index]
    assert KIND.caption is not None
    for told, ids, mask in zip(
        KIND.caption(data, gallery, "test", threat)["words"],
        result.x_adv["ids"],
        x["mask"],
        strict=True,  # type: ignore[index]
    ):
        keys = [token.key for token in tokens_of("".join(after for _, after in json.loads(str(told))))]
        assert keys == [threat.lexicon.words[i] for i in ids[mask].tolist()]
    assert threat.text() == "characters:0.5,k=6" and words(data, threat.text()).text() == threat.text()
    for word in ("lovely", "awful", "the", "a1b2", "film"):
        forms = misspellings(word, 6, known={"flim"})
        assert len(forms) == (6 if word.isalpha() and len(word) > 3 else 0) and word not in forms
        assert all(form[0] == word[0] and abs(len(form) - len(word)) <= 1 for form in forms)
    assert misspellings("film", 6, known={"flim"})[0] == "flim"
    with pytest.raises(ValueError, match="read as words"):
        KIND.make_threat("characters:1", replace(data, unit="characters"))


def test_what_cannot_be_attacked_says_so(data: Texts, networks: dict[str, nn.Module]) -> None:
    threat, x = words(data), some(data)
    for bad, message in (
        (x["ids"], "a Tensor; texts come as"), ({"ids": x["ids"]}, "inputs are ids"),
        ({**x, "ids": x["ids"].int()}, "torch.int32"), ({**x, "ids": x["ids"] - 100}, "go down to -"),
        ({**x, "mask": x["mask"] & False}, "6 of 6 texts are empty"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            greedy(threat)(networks["bag"], bad, data.y_test[:6])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="greedy replaces words"):
        KIND.make_plan("greedy", KIND.make_threat("embedding:1", data, networks["bag"]))
    with pytest.raises(ValueError, match="share above 0, at most 1"):
        words(data, "words:2")
    with pytest.raises(ValueError, match="no word vectors that could move"):
        KIND.make_threat("embedding:1", data, nn.Linear(1, 1))
    beyond = {**x, "ids": x["ids"] + 10_000 * x["mask"]}
    result = greedy(threat)(networks["bag"], beyond, data.y_test[:6])
    assert torch.equal(result.x_adv["ids"], beyond["ids"])  # type: ignore[index]  # unknown words stay
