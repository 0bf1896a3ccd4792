"""Fine-tuning: what is trained, how, and that the best state is kept."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import fmpq_fx
from fmpq_fx import FmpqError, History
from fmpq_fx.history import Settings
from fmpq_fx.passes.annotation import graph_note
from fmpq_fx.quant import quantized_layers
from fmpq_fx.training.bfloat16 import transforms_in_bfloat16
from fmpq_fx.training.loop import train
from fmpq_fx.training.run import TrainingRun, parameter_groups
from support.coded_models import CODED, graph_of
from support.finetuning import LMBDA, loss_of, photos, same_state, tuned
from support.small_models import small_model


def test_the_rd_loss_on_other_images_falls_and_the_best_state_is_what_is_left(gm: fx.GraphModule) -> None:
    held_out = photos(9)[6:]
    before = loss_of(gm, [image[:, 16:80, 16:80] for image in held_out])
    history = tuned(gm, steps=40, validation=[image[:, 16:80, 16:80] for image in held_out])
    after = loss_of(gm, [image[:, 16:80, 16:80] for image in held_out])
    assert after < before
    assert history.validation[0].rd_loss == pytest.approx(before, rel=1e-4)
    assert history.best.rd_loss == pytest.approx(after, rel=1e-4)
    assert history.gain == pytest.approx(1 - after / before, abs=3e-4)
    assert len(history.losses) == 40
    assert [v.step for v in history.validation] == list(range(0, 41, 4))
    assert graph_note(gm).history is history


def test_weights_steps_and_zero_points_are_all_trained_and_stay_shared_with_the_model(
    gm: fx.GraphModule,
) -> None:
    untrained = copy.deepcopy(gm)
    before = dict(untrained.named_parameters())
    tuned(gm, lr=1e-4)
    moved = {name for name, p in gm.named_parameters() if not torch.equal(p, before[name])}
    for site in ("g_a.0", "g_a.1", "h_s.2", "g_s.6"):
        assert f"{site}.weight_quantizer.log_scale" in moved
    assert {"g_a.0.layer.weight", "g_a.1.layer.gamma", "g_s.6.layer.bias"} <= moved
    assert {"g_a.2.input_quantizer.log_scale", "entropy_bottleneck.quantiles"} <= moved
    x = torch.stack(photos(1, side=64))
    with torch.no_grad():
        trained, codec, other = (
            model(x)["x_hat"] for model in (gm.eval(), fmpq_fx.convert(gm), untrained.eval())
        )
    # Kernels of another memory layout round otherwise, which is little beside what training changes.
    assert (codec - trained).norm() < 0.1 * (other - trained).norm()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_the_same_where_the_caller_has_switched_gradients_off(
    gm: fx.GraphModule, mode: Callable[[], Any]
) -> None:
    other = copy.deepcopy(gm)
    tuned(gm, steps=4)
    with mode():
        tuned(other, steps=4, images=photos(6))
    assert same_state(gm, other)


def test_a_graph_that_is_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        gm = fmpq_fx.prepare(
            small_model("bmshj2018-hyperprior"),
            0.25,
            calibration=photos(2, side=64),
            bits=[8],
            planner="uniform",
            activation_bits=8,
        )
        again = fmpq_fx.rewrite(small_model("bmshj2018-hyperprior"), fmpq_fx.plan_of(gm))
        moved = copy.deepcopy(gm)
    tuned(gm, steps=2)
    tuned(again, steps=2)
    with pytest.raises(FmpqError, match=r"inference_mode.*copy\.deepcopy"):
        tuned(moved)
    tuned(copy.deepcopy(moved), steps=2)


def test_the_training_mode_comes_back(gm: fx.GraphModule) -> None:
    for mode in (True, False):
        tuned(gm.train(mode), steps=1)
        assert gm.training is mode


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    prepared: fx.GraphModule,
) -> None:
    models: list[fx.GraphModule] = []
    for seed in (0, 0, 1):
        gm = copy.deepcopy(prepared)
        torch.manual_seed(seed + len(models))  # of the caller; it must not matter
        tuned(gm, steps=4, seed=seed)
        models.append(gm)
    assert same_state(models[0], models[1])
    assert not same_state(models[0], models[2])


def test_the_random_numbers_of_the_caller_are_left_alone(gm: fx.GraphModule) -> None:
    before = torch.get_rng_state()
    tuned(gm, steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_diverges_stops_says_so_and_leaves_the_model_as_it_came(
    gm: fx.GraphModule, prepared: fx.GraphModule
) -> None:
    with torch.no_grad():
        gm.get_parameter("g_s.6.layer.bias").fill_(1e18)  # its square is beyond float32
    before = copy.deepcopy(gm)
    with pytest.warns(UserWarning, match=r"diverged at step 1: .*try a lower lr"):
        history = tuned(gm)
    assert len(history.losses) == 1
    assert same_state(gm, before)


def test_a_run_that_ends_above_where_it_began_says_so_and_leaves_the_model_as_it_came(
    gm: fx.GraphModule, prepared: fx.GraphModule
) -> None:
    with pytest.warns(UserWarning, match=r"RD loss on the validation images ended above.*try a lower lr"):
        history = tuned(gm, lr=10.0)
    assert history.best.step == 0
    assert history.gain == 0
    assert same_state(gm, prepared)


def test_mse_is_what_is_lowered_where_it_is_asked_for(gm: fx.GraphModule) -> None:
    history = tuned(gm, loss="mse", steps=20)
    assert history.best.mse == min(v.mse for v in history.validation) < history.validation[0].mse
    assert history.settings.loss == "mse"


def test_groups_hold_every_parameter_once(gm: fx.GraphModule) -> None:
    settings = Settings(LMBDA)
    groups = parameter_groups(gm, settings)
    # Quantizers of whole numbers have nothing to learn.
    names = {id(p): name for name, p in gm.named_parameters() if p.requires_grad}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert set(names.values()) - set(rates) == {"entropy_bottleneck.quantiles"}
    assert rates["g_a.0.layer.weight"] == rates["entropy_bottleneck.matrices.0"] == settings.lr
    assert rates["g_a.0.weight_quantizer.log_scale"] == settings.quantizer_lr
    assert rates["g_a.0.input_quantizer.zero_point"] == settings.quantizer_lr * 255


def test_a_frozen_parameter_stays_frozen(gm: fx.GraphModule) -> None:
    weight = gm.get_parameter("g_a.0.layer.weight").requires_grad_(False)
    before = weight.clone()
    tuned(gm, steps=3)
    assert torch.equal(weight, before)


def test_where_all_is_frozen_there_is_nothing_to_train(gm: fx.GraphModule) -> None:
    with pytest.raises(FmpqError, match="all parameters are frozen"):
        tuned(gm.requires_grad_(False))


def test_float_models_are_trained_by_the_same_loop() -> None:
    model = small_model("mbt2018-mean")
    settings = Settings(LMBDA, steps=20, crop=64, validate_every=10, lr=1e-3)
    history = train(model, photos(6), settings, workers=0)
    assert history.gain > 0


def test_in_bfloat16_entropy_models_compute_as_in_float32(gm: fx.GraphModule) -> None:
    """Likelihoods of the same float32 latents are the same bits; of bfloat16 ones they would not be."""
    x = torch.stack(photos(1, side=64))
    kinds: dict[str, torch.dtype] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            kinds[name] = (out[1] if isinstance(out, tuple) else out).dtype

        return hook

    for name in ("g_a.0", "entropy_bottleneck", "gaussian_conditional"):
        gm.get_submodule(name).register_forward_hook(look(name))
    with transforms_in_bfloat16(gm, x.device):
        output = gm(x)
    assert kinds == {
        "g_a.0": torch.bfloat16,
        "entropy_bottleneck": torch.float32,
        "gaussian_conditional": torch.float32,
    }
    assert output["likelihoods"]["y"].dtype == torch.float32
    bottleneck = gm.get_submodule("entropy_bottleneck")
    assert "forward" not in vars(bottleneck), "the modules are as before"
    z = torch.randn(1, 8, 4, 4)
    with transforms_in_bfloat16(gm, x.device):
        assert torch.equal(bottleneck(z)[1], copy.deepcopy(bottleneck)(z)[1])


def test_training_in_bfloat16_lowers_the_loss_of_the_float32_model(gm: fx.GraphModule) -> None:
    history = tuned(gm, bfloat16=True, steps=20)
    assert history.gain > 0
    assert all(p.dtype == torch.float32 for p in gm.parameters())


@pytest.mark.parametrize(
    ("name", "bfloat16"),
    [("elic-official", False), ("cheng2020-checkerboard", False), ("cheng2020-checkerboard", True)],
)
def test_layers_inside_a_latent_codec_are_trained(name: str, bfloat16: bool) -> None:
    torch.manual_seed(0)
    x = torch.stack(photos(2, side=64))
    gm = graph_of(CODED[name]().eval(), x, bits=8)
    before = copy.deepcopy(dict(gm.named_parameters()))
    run = TrainingRun(gm, [x], Settings(LMBDA, bfloat16=bfloat16))
    run.step(x)
    assert not run.diverged
    trained = {name for name, p in gm.named_parameters() if not torch.equal(p, before[name])}
    inside = {name for name in trained if name.startswith("latent_codec") and name.endswith("layer.weight")}
    assert len(inside) > 2


def test_gradients_do_not_stay(gm: fx.GraphModule) -> None:
    tuned(gm, steps=1)
    assert all(p.grad is None for p in gm.parameters())


def test_all_images_to_validate_on_count(gm: fx.GraphModule) -> None:
    history = tuned(gm, steps=1, validation=photos(11, side=64))
    assert history.validated_on == "11 crops of 64 x 64"


def test_a_history_saves_loads_and_prints(gm: fx.GraphModule, tmp_path: Path) -> None:
    history = tuned(gm)
    history.save(tmp_path / "history.json")
    assert History.load(tmp_path / "history.json") == history
    printed = str(history)
    assert f"{history.best.rd_loss:.4f}  kept" in printed
    assert "trained on 5 images, validated on 8 crops of 64 x 64" in printed
    torch.save(gm, tmp_path / "gm.pt")
    pickled = torch.load(tmp_path / "gm.pt", weights_only=False)
    assert graph_note(copy.deepcopy(gm)).history == graph_note(pickled).history == history
    table = " ".join(fmpq_fx.bit_table(gm).split())  # lines are wrapped
    assert "12 steps with the RD loss" in table
    assert f"{history.validation[0].rd_loss:.4f} -> {history.best.rd_loss:.4f}" in table


def test_trained_layers_stay_on_their_grids(gm: fx.GraphModule) -> None:
    tuned(gm, steps=4)
    for layer in quantized_layers(gm).values():
        integers = layer.weight_quantizer.integers(layer.float_weight())
        assert integers.abs().max() <= layer.weight_quantizer.high
        grid = integers * layer.weight_quantizer.scale
        assert torch.equal(layer.weight_quantizer(layer.float_weight()), grid)
