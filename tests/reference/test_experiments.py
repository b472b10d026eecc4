import copy
import functools
import itertools
import math
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from support import assert_message

from dpsims.errors import InputError
from dpsims.nn import backbone as backbone_module
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims_reference.batches import collate, train_batches
from dpsims_reference.cli import main
from dpsims_reference.config import Config, DiscriminatorConfig
from dpsims_reference.config_json import from_dict, to_dict
from dpsims_reference.data.scenes import StreetScenes
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.experiments import (
    EXPERIMENTS,
    describe,
    experiment,
    format_experiments,
    tables,
)
from dpsims_reference.experiments.experiment import changed
from dpsims_reference.generator import build_generator
from dpsims_reference.logs import read_log
from dpsims_reference.objective import Objective
from dpsims_reference.parsing import parse_train, train_config
from dpsims_reference.presets import preset
from dpsims_reference.steps import TrainingStep


@pytest.fixture(scope="module", autouse=True)
def _each_network_is_built_once():
    """timm takes seconds for a network, and most rows share theirs."""
    networks = {}

    def build(plan, model, pretrained, weights):
        key = (plan.name, str(plan.options), pretrained, weights, torch.get_default_device())
        if key not in networks:
            networks[key] = original(plan, model, pretrained, weights)
        network, source = networks[key]
        return copy.deepcopy(network), source

    original = backbone_module.build_network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone_module, "build_network", build)
        # the options of a plan are only read
        patch.setattr(backbone_module, "plan_model", functools.cache(backbone_module.plan_model))
        yield


@pytest.fixture(scope="module")
def scenes():
    return StreetScenes(8, image_size=(64, 64))


def test_every_row_of_every_table_is_there():
    # Table 5 has six rows for each of two backbones, Table 8 three for each of two data sets
    assert {table: len(rows) for table, rows in tables().items()} == {
        "table2": 5,
        "table3": 4,
        "table5": 12,
        "table6": 7,
        "table7": 4,
        "table8": 6,
        "tableS6": 4,
        "tableS9": 3,
        "tableS10": 2,
        "tableS11": 4,
        "tableS12": 4,
        "tableS13": 2,
    }
    for name, row in EXPERIMENTS.items():
        assert row.name == name
        assert re.fullmatch(r"table[A-Z]?\d+/[a-z0-9_.]+", name)


def test_rows_of_the_papers_own_model_print_its_numbers():
    # Table 1, in the same units
    main_results = {"ade20k": (22.7, 67.8), "coco_stuff": (13.6, 65.2), "cityscapes": (38.2, 78.5)}
    own = {
        name: (row.published["FID"], row.published["mIoU_MF"])
        for name, row in EXPERIMENTS.items()
        if row.config("paper") == preset(row.dataset)
    }
    expected = {name: main_results[EXPERIMENTS[name].dataset] for name in own}
    # the one place where the paper disagrees with itself
    expected["tableS11/cityscapes_balanced"] = (38.3, 78.3)
    assert own == expected
    # one in every table, and one for each of the two data sets of Tables 8, S11 and S12
    assert len(own) == 15


def test_rows_of_a_table_differ():
    for rows in tables().values():
        configs = [(row.dataset, row.config("paper")) for row in rows]
        for one, other in itertools.combinations(configs, 2):
            assert one != other


@pytest.mark.parametrize("size", ["paper", "tiny"])
def test_configurations_survive_json(size):
    for row in EXPERIMENTS.values():
        config = row.config(size)
        assert from_dict(Config, to_dict(config)) == config


def test_published_numbers_are_plausible():
    for row in EXPERIMENTS.values():
        assert 10 < row.published["FID"] < 60
        assert 40 < row.published["mIoU_MF"] < 80
        assert 0 <= row.published.get("LPIPS", 0) < 1


def shape_of(part):
    """What of a part of the configuration decides the shapes; weights and their tag do not."""
    if not isinstance(part, DiscriminatorConfig):
        return part
    bare = part.backbone.partition(".")[0]
    return replace(part, backbone=bare, pretrained=False, weights=None)


def distinct(size, *parts):
    """The names of all rows, those together whose networks are alike in ``parts``."""
    found = {}
    for name, row in EXPERIMENTS.items():
        config = row.config(size)
        key = [getattr(config, part) for part in parts]
        key = tuple(map(shape_of, key) if size == "paper" else key)
        found.setdefault(key, []).append(name)
    return [pytest.param(names, id=names[0]) for names in found.values()]


# networks of the paper's size, without memory


@pytest.mark.parametrize("names", distinct("paper", "generator", "data"))
def test_generators_of_the_papers_size(names):
    # spectral norm changes no shape, and putting it on takes most of the time
    config = changed(experiment(names[0]).config("paper"), {"generator": {"spectral_norm": False}})
    height, width = config.data.image_size
    labels = torch.zeros(2, height, width, dtype=torch.uint8, device="meta")
    extra = torch.zeros(2, 2, height, width, device="meta") if config.data.instances else None
    with torch.device("meta"):
        generator = build_generator(config)
        output = generator(labels, torch.zeros(2, 64), extra)
    assert output.images.shape == (2, 3, height, width)
    assert output.features.shape == (2, 64, height, width)


@pytest.mark.parametrize("names", distinct("paper", "discriminator", "data"))
def test_discriminators_of_the_papers_size(names):
    without = {"pretrained": False, "weights": None, "spectral_norm": False}
    config = changed(experiment(names[0]).config("paper"), {"discriminator": without})
    height, width = config.data.image_size
    with torch.device("meta"):
        discriminator = build_discriminator(config)
        logits = discriminator(torch.zeros(2, 3, height, width))
    assert logits.shape == (2, config.data.num_classes + 1, height, width)


def test_timm_knows_every_backbone_and_has_weights_for_it():
    for row in EXPERIMENTS.values():
        for size in ("paper", "tiny"):
            known = timm.get_pretrained_cfg(row.config(size).discriminator.backbone)
            assert known is not None
            assert size == "tiny" or known.has_weights


def test_every_row_is_among_those_that_were_built():
    for parts in (("generator", "data"), ("discriminator", "data")):
        names = itertools.chain(*(case.values[0] for case in distinct("paper", *parts)))
        assert set(names) == set(EXPERIMENTS)


# tiny networks


def training_step(config):
    torch.manual_seed(0)
    generator, discriminator = build_generator(config), build_discriminator(config)
    objective = Objective(config, discriminator)
    objective.diversity_hinge = 0.1
    return TrainingStep(generator, discriminator, objective, config)


def expected_terms(config):
    terms = {"d_real", "d_fake", "g_pixel", "g_contrastive", "g_diversity"}
    if config.objective.contrastive_weight == 0:
        terms.remove("g_contrastive")
    if config.objective.diversity_weight == 0:
        terms.remove("g_diversity")
    return terms


TRAINED = ("generator", "discriminator", "objective")


@pytest.mark.parametrize("names", distinct("tiny", *TRAINED))
def test_every_change_trains(names, scenes):
    config = experiment(names[0]).config("tiny")
    step = training_step(config)
    # the least that has two images of one map
    samples = [scenes.view(index) for index in range(2)]
    batch = collate(samples, instances=config.data.instances)
    for index in range(2):
        terms = step(batch, index)
        assert set(terms) == expected_terms(config)
        assert all(math.isfinite(value) for value in terms.values())
    for module in (step.generator, step.discriminator):
        assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("row", tables()["tableS12"], ids=lambda row: row.name)
def test_instances_reach_the_batch_in_the_rows_that_have_them(row, scenes):
    config = row.config("tiny")
    batch = next(train_batches(scenes, config))
    assert batch.labels.shape == (config.optim.batch_size, 64, 64)
    assert (batch.extra is None) == row.name.endswith("no_instances")


def test_uniform_draws_need_no_presence():
    class Unlabelled(StreetScenes):
        def presence(self):
            raise LookupError

    scenes = Unlabelled(8, image_size=(64, 64))
    uniform = experiment("tableS11/cityscapes_uniform").config("tiny")
    assert next(train_batches(scenes, uniform)).images.shape[0] == uniform.optim.batch_size
    with pytest.raises(LookupError):
        next(train_batches(scenes, experiment("tableS11/cityscapes_balanced").config("tiny")))


# what the changes change


def discriminator_of(name):
    return build_discriminator(experiment(name).config("tiny"))


def test_conditioning_of_table_5():
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    raw, squashed, normal = (
        discriminator_of(f"table5/{row}_lite1").encode(images)[0]
        for row in ("baseline", "no_batchnorm", "no_sigmoid")
    )
    torch.testing.assert_close(squashed, torch.sigmoid(raw))
    assert normal.mean((0, 2, 3)).abs().max() < 1e-3
    # not all channels vary, so that some stay below one
    torch.testing.assert_close(normal.std(), torch.ones(()), atol=0.1, rtol=0)
    # mixing is behind what the other parts of the step see
    mixed = discriminator_of("table5/ccm_csm_lite1")
    torch.testing.assert_close(mixed.encode(images)[0], raw)
    assert mixed.mixing is not None
    assert mixed.decoder.channels == [64, 64, 128, 256]
    assert not any("mixing" in name for name, _ in mixed.named_parameters())
    assert any("mixing" in name for name in mixed.state_dict())


def test_random_frozen_and_trained_backbones_of_table_s6(scenes):
    batch = collate([scenes.view(index) for index in range(2)], instances=True)
    found = {}
    for row in ("fixed_random", "finetuned_random", "finetuned_pretrained", "fixed_pretrained"):
        config = experiment(f"tableS6/{row}").config("tiny")
        step = training_step(config)
        backbone = step.discriminator.backbone
        found[row] = backbone.weights_source
        before = [p.detach().clone() for p in backbone._extractor.parameters()]
        step(batch, 0)
        moved = [
            not torch.equal(new, old)
            for new, old in zip(backbone._extractor.parameters(), before, strict=True)
        ]
        assert all(moved) if row.startswith("finetuned") else not any(moved)
        in_state = any("backbone.network" in key for key in step.discriminator.state_dict())
        assert in_state == row.startswith("finetuned")
    assert found["fixed_random"] == found["finetuned_random"] == "random"
    assert found["fixed_pretrained"] == found["finetuned_pretrained"]
    assert found["fixed_pretrained"].startswith("pypi")


def test_the_generators_of_table_6():
    for name, expected in (
        ("dp_sims", (True, True)),
        ("no_self_attention", (True, False)),
        ("no_cross_attention", (False, True)),
        ("oasis_generator", (False, False)),
    ):
        generator = build_generator(experiment(f"table6/{name}").config("tiny"))
        kinds = (CrossAttentionNoiseInjector, SelfAttention2d)
        found = tuple(any(isinstance(m, kind) for m in generator.modules()) for kind in kinds)
        assert found == expected, name


@pytest.mark.parametrize("row", ["no_cross_attention", "oasis_generator"])
def test_joined_noise_reaches_every_image_from_the_start(row):
    generator = build_generator(experiment(f"table6/{row}").config("tiny")).eval()
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        first, second = (generator(labels, torch.randn(1, 64)).images for _ in range(2))
    assert (first - second).abs().max() > 1e-4


def test_a_trained_discriminator_has_no_features_to_contrast():
    for name in ("table6/oasis_discriminator", "tableS6/finetuned_random"):
        config = experiment(name).config("tiny")
        own = replace(config.objective, contrastive_features="discriminator")
        discriminator = build_discriminator(config)
        assert discriminator.encode(torch.zeros(1, 3, 64, 64)) == []
        with pytest.raises(InputError) as caught:
            Objective(replace(config, objective=own), discriminator)
        assert_message(caught.value, "contrastive_features", "frozen backbone", "'discriminator'")


# names and the command line


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("table5/ccm", "table5/ccm_csm"),
        ("tables6/fixed_random", "tableS6/fixed_random"),
        ("table6/no_selfattention", "table6/no_self_attention"),
        ("?", "table2/swin_b"),
    ],
)
def test_an_unknown_name_lists_similar_ones(name, similar):
    with pytest.raises(InputError) as caught:
        experiment(name)
    assert_message(caught.value, "experiment: name must", similar, f"got {name!r}")


def test_the_verb_lists_every_row_with_the_papers_numbers(capsys):
    main(["experiments"])
    text = capsys.readouterr().out
    assert set(EXPERIMENTS) <= set(text.splitlines())
    assert "not been reproduced" in text
    assert "FID 22.9, mIoU_MF 67.7, LPIPS 1.5e-05" in text
    main(["experiments", "--table", "tableS10"])
    text = capsys.readouterr().out
    assert "tableS10/image" in text
    assert "tableS9" not in text
    with pytest.raises(InputError) as caught:
        format_experiments("table4")
    assert_message(caught.value, "table must be one of", "table5", "'table4'")


def test_an_experiment_gives_the_defaults_and_options_change_them():
    arguments = ["--experiment", "table7/tau_0.7", "--size", "paper", "--optim.batch-size", "2"]
    options = parse_train([*arguments, "--steps", "3"])
    config = train_config(options)
    assert config.objective.temperature == 0.7
    assert config.data == preset("ade20k").data
    assert (config.optim.batch_size, config.optim.steps) == (2, 3)
    assert describe(experiment(options.experiment), options.size).splitlines() == [
        "table7/tau_0.7 at paper size: temperature 0.7 in the contrastive loss",
        "the paper, on ade20k: FID 24.1, mIoU_MF 66.3 (not reproduced)",
    ]
    tiny = train_config(parse_train(["--experiment=table7/tau_0.7"]))
    assert tiny == experiment("table7/tau_0.7").config("tiny")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--experiment", "table5/cmm"], ["table5/", "'table5/cmm'"]),
        (["--preset", "tiny", "--experiment", "table6/dp_sims"], ["preset", "'table6/dp_sims'"]),
    ],
)
def test_faults_of_the_options_end_with_code_2(arguments, parts, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(part in error for part in parts)


@pytest.mark.parametrize("name", ["table5/ccm_csm", "table6/oasis_discriminator"])
def test_the_command_line_trains_an_experiment(name, tmp_path, capsys):
    small = ["--data.num-scenes", "6", "--optim.batch-size", "2", "--device", "cpu"]
    main(["train", "--experiment", name, "--steps", "1", "--out", str(tmp_path), *small])
    text = capsys.readouterr().out
    assert f"{name} at tiny size" in text
    assert experiment(name).numbers() in text
    assert len(read_log(tmp_path / "log.jsonl")) == 1


def test_the_docs_table_is_made_of_the_same_rows(monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "conf.py"
    if not page.is_file():
        pytest.skip("the docs are not part of this checkout")
    pytest.importorskip("sphinx", reason="needs the docs group")
    # the page's settings put the sources in front
    monkeypatch.setattr(sys, "path", sys.path[:])
    text = runpy.run_path(str(page))["experiment_tables"]()
    listed = re.findall(r"^   \* - ``(.+)``$", text, re.MULTILINE)
    assert listed == list(EXPERIMENTS)
    assert text.count("     - not reproduced") == len(EXPERIMENTS)
    for row in EXPERIMENTS.values():
        assert f"     - {row.numbers()}\n" in text
