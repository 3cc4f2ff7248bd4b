"""The V2 Ultra modules: formulas, gradients, start near identity, batch independence, cost, extremes, export."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from models.bifpn import BiFPN, upsample
from models.blocks import channel_shuffle
from models.cbam import CBAM
from models.featherface import build_model
from models.heads import Heads
from models.heads_ultra import CascadeRefinement, CBAM_Cascade, MultiPath, SmartHead_Fusion
from models.modules_v2_ultra import (
    AttentionAmplification,
    ContextualSharing,
    FeatureRecycling,
    Monitored,
    ProgressiveEnhancement,
    SceneComplexity,
    SmartMultiscaleFusion,
    area_downsample,
    level_norms,
    stop_skipping,
)
from models.neck_ultra import (
    AdaptiveContextFusion,
    BiFPN_Ultra,
    DynamicChannelAllocation,
    ProgressiveFeatureRefinement,
    contrast,
)
from models.ssh import SSH
from models.summary import count_macs
from utils.config import ConfigError, load_config

C, BACKBONE, ANCHORS = 28, [64, 128, 256], [2, 2, 2]
SIZES = {"even": (16, 24), "odd": (13, 7), "one pixel": (1, 1)}


def pyramid(batch=2, size=(16, 24), channels=(C, C, C)):
    """P3, P4, P5 of random values, each half the one before, rounded up."""
    levels = []
    for c in channels:
        levels.append(torch.randn(batch, c, *size))
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return levels


def predictions(levels):
    """Coarse predictions that depend on the image alone."""
    cells = torch.cat([x.flatten(2) for x in levels], 2).transpose(1, 2).repeat_interleave(2, 1)  # [B, N, C]
    return {"logits": cells[..., 0], "boxes": cells[..., 1:5], "landmarks": cells[..., 5:15]}


class Wrapped(nn.Module):
    """Every module behind one signature: ``(levels, complexity) -> list of tensors``."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, levels, complexity):
        return list(self.call(self.module, levels, complexity))


def cascade():
    return CBAM_Cascade([AttentionAmplification(CBAM(C, 64), 3) for _ in range(3)], C)


def flat(nested):
    return [x for part in nested for x in part]


def refine(module, levels, complexity):
    return module(predictions(levels), levels).values()


class Paths(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.average = Heads(C, ANCHORS), MultiPath(C, 1)

    def forward(self, levels):
        main = self.heads(levels, levels, levels)
        out, paths = self.average(main, [[x.flip(1) for x in levels]], self.heads)
        return [*out.values(), *(v for path in paths for v in path.values())]


# name -> (constructor, call); C = 28 on three levels
MODULES = {
    "SceneComplexity": (lambda: SceneComplexity([C] * 3), lambda m, x, c: [m(x)]),
    "AttentionAmplification": (lambda: AttentionAmplification(CBAM(C, 64), 3), lambda m, x, c: map(m, x)),
    "ContextualSharing": (
        lambda: ContextualSharing(SSH(C, "grouped", 8)),
        lambda m, x, c: [m(level, c) for level in x],
    ),
    "AdaptiveContextFusion": (lambda: AdaptiveContextFusion(C), lambda m, x, c: m(x, c)),
    "DynamicChannelAllocation": (lambda: DynamicChannelAllocation(C), lambda m, x, c: m(x, c)),
    "ProgressiveFeatureRefinement": (lambda: ProgressiveFeatureRefinement(C), lambda m, x, c: m(x)),
    "CBAM_Cascade": (cascade, lambda m, x, c: flat(m(x))),
    "SmartHead_Fusion": (lambda: SmartHead_Fusion(C), lambda m, x, c: flat(m(x))),
    "CascadeRefinement": (lambda: CascadeRefinement(C, ANCHORS), refine),
    "MultiPath": (Paths, lambda m, x, c: m(x)),
    "FeatureRecycling": (FeatureRecycling, lambda m, x, c: m(x, [level * 2 for level in x])),
    "ProgressiveEnhancement": (lambda: ProgressiveEnhancement(C), lambda m, x, c: map(m, x)),
    "SmartMultiscaleFusion": (SmartMultiscaleFusion, lambda m, x, c: m(x)),
}


@pytest.fixture(params=MODULES)
def wrapped(request):
    make, call = MODULES[request.param]
    return Wrapped(make(), call)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def settle(wrapped):
    """Some training steps' worth of batch-norm statistics, so that eval is not the default mean 0, variance 1."""
    wrapped.train()
    with torch.no_grad():
        for _ in range(3):
            wrapped(pyramid(4), torch.rand(4))
    return wrapped.eval()


# --- every module -----------------------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_from_the_first_step(wrapped):
    if not parameters(wrapped):
        pytest.skip("no parameters")
    out = wrapped.train()(pyramid(3), torch.tensor([0.2, 0.4, 0.9]))
    sum((x * torch.randn_like(x)).sum() for x in out).backward()
    assert not [n for n, p in wrapped.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-6]


@pytest.mark.parametrize(
    "name, gates",
    [
        ("ContextualSharing", {"slope", "bias"}),
        ("AdaptiveContextFusion", {"base", "slope"}),
        ("DynamicChannelAllocation", {"bias", "slope"}),
        ("ProgressiveFeatureRefinement", {"gain", "bias"}),
        ("MultiPath", {"average.weight"}),
    ],
)
def test_one_step_of_the_optimiser_moves_every_gate(name, gates):
    make, call = MODULES[name]
    module = make()
    learnt = dict(module.named_parameters())
    assert gates <= learnt.keys()
    before = {gate: learnt[gate].clone() for gate in gates}
    sum((x * torch.randn_like(x)).sum() for x in call(module, pyramid(3), torch.tensor([0.2, 0.4, 0.9]))).backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert not [gate for gate in gates if torch.equal(learnt[gate], before[gate])]


def test_every_level_has_a_batch_norm_of_its_own():
    norms = level_norms(C, 3, gamma=0.5)
    for i, norm in enumerate(norms):
        norm(torch.randn(4, C, 8, 8) + 10 * i)
    torch.testing.assert_close(
        torch.stack([n.running_mean for n in norms]).mean(1), torch.arange(3.0), atol=0.1, rtol=0
    )
    assert len({id(p) for n in norms for p in n.parameters()}) == 6 and all((n.weight == 0.5).all() for n in norms)


@pytest.mark.parametrize("name", ["ContextualSharing", "AdaptiveContextFusion", "DynamicChannelAllocation"])
def test_gradient_reaches_the_complexity_from_each_of_its_readers(name):
    make, call = MODULES[name]
    complexity = torch.tensor([0.2, 0.4, 0.9], requires_grad=True)
    sum((x * torch.randn_like(x)).sum() for x in call(make(), pyramid(3), complexity)).backward()
    assert (complexity.grad.abs() > 1e-6).all()


def test_eval_of_a_batch_equals_one_by_one(wrapped):
    settle(wrapped)
    levels, complexity = pyramid(4), torch.rand(4)
    with torch.no_grad():
        together = wrapped(levels, complexity)
        for i in range(4):
            alone = wrapped([x[i : i + 1] for x in levels], complexity[i : i + 1])
            for a, b in zip(alone, together):
                torch.testing.assert_close(a, b[i : i + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_any_size_and_batch_of_one_is_finite(wrapped, size):
    settle(wrapped)
    levels = [x.requires_grad_() for x in pyramid(1, size)]
    out = wrapped(levels, torch.rand(1))
    assert all(x.isfinite().all() for x in out)
    sum(x.sum() for x in out).backward()
    assert all(x.grad.isfinite().all() for x in levels if x.grad is not None)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_is_valid_for_other_sizes_and_batches(wrapped):
    settle(wrapped)
    traced = torch.jit.trace(wrapped, (pyramid(2), torch.rand(2)), check_trace=False)
    levels, complexity = pyramid(3, SIZES["odd"]), torch.rand(3)
    with torch.no_grad():
        for a, b in zip(traced(levels, complexity), wrapped(levels, complexity)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_copy_of_the_model_works_after_a_forward(wrapped):
    """Weight averaging and inference copies use deepcopy; shared parameters must stay shared in the copy."""
    settle(wrapped)
    twin = copy.deepcopy(wrapped)
    twin.load_state_dict(wrapped.state_dict())
    assert parameters(twin) == parameters(wrapped)
    levels, complexity = pyramid(), torch.rand(2)
    with torch.no_grad():
        for a, b in zip(twin(levels, complexity), wrapped(levels, complexity)):
            torch.testing.assert_close(a, b)


def test_monitors_give_plain_finite_numbers(wrapped):
    wrapped.eval()(pyramid(), torch.rand(2))
    values = [v for m in wrapped.modules() if isinstance(m, Monitored) for v in m.monitor().values()]
    assert all(type(v) is float and abs(v) < 100 for v in values)
    assert values or not any(isinstance(m, Monitored) for m in wrapped.modules())


def test_monitors_are_silent_before_the_first_forward(wrapped):
    assert all(m.monitor() == {} for m in wrapped.modules() if isinstance(m, Monitored))


# --- cost -------------------------------------------------------------------------------------------------------


def test_plan_b_costs_at_most_400_parameters():
    cbam = CBAM(C, 64)
    plain = parameters(cbam)
    cost = parameters(SceneComplexity(BACKBONE)) + parameters(AttentionAmplification(cbam, 3)) - plain
    cost += 3 * parameters(ContextualSharing(nn.Identity()))
    cost += sum(parameters(m) for m in (FeatureRecycling(), ProgressiveEnhancement(C), SmartMultiscaleFusion()))
    assert 0 < cost <= 400


def test_plan_a_costs_at_most_4500_parameters():
    neck = nn.Identity()
    modules = [BiFPN_Ultra(neck, C), CBAM_Cascade([], C), SmartHead_Fusion(C)]
    modules += [CascadeRefinement(C, ANCHORS), MultiPath(C, 1)]
    assert 0 < sum(map(parameters, modules)) <= 4500


# --- plan B -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_feature_recycling_formula(size):
    (n3, n4, n5), (l3, l4, l5) = pyramid(size=size), pyramid(size=size)
    doubled = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in (n4, n5)]
    out = FeatureRecycling()([n3, n4, n5], [l3, l4, l5])
    torch.testing.assert_close(out[0], n3 + l3 + doubled[0][..., : size[0], : size[1]])
    torch.testing.assert_close(out[1], n4 + l4 + doubled[1][..., : n4.shape[2], : n4.shape[3]])
    torch.testing.assert_close(out[2], n5 + l5)


def test_attention_amplification_formula():
    cbam = CBAM(C, 64).eval()
    x = torch.randn(2, C, 9, 5)
    a1 = cbam(x)
    a2 = cbam(a1 + x)
    a3 = cbam(a2 + a1 + x)
    for times, last in ((1, a1), (2, a2), (3, a3)):
        torch.testing.assert_close(AttentionAmplification(cbam, times).eval()(x), F.relu(last + x))


def test_attention_amplification_shares_weights_but_not_statistics():
    module = settle_one(AttentionAmplification(CBAM(C, 64), 3), torch.randn(8, C, 9, 5))
    assert parameters(module) == parameters(CBAM(C, 64))
    stats = [b for n, b in module.named_buffers() if n.endswith("running_var")]
    assert len(stats) == 3 and stats[0] < stats[1] < stats[2]  # inputs grow from use to use


def test_eval_of_attention_amplification_matches_what_training_computed():
    x = torch.randn(8, C, 9, 5)
    module = settle_one(AttentionAmplification(CBAM(C, 64), 3), x, steps=400)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), module.train()(x), atol=2e-2, rtol=2e-2)


def settle_one(module, x, steps=3):
    module.train()
    with torch.no_grad():
        for _ in range(steps):
            module(x)
    return module


@pytest.mark.parametrize("channels, groups", [(32, 8), (28, 7), (64, 8), (52, 4), (5, 5)])
def test_progressive_enhancement_formula(channels, groups):
    x = torch.randn(2, channels, 3, 4)
    expected = x
    for _ in range(3):
        expected = channel_shuffle(expected + 0.1 * expected.tanh(), groups)
    torch.testing.assert_close(ProgressiveEnhancement(channels, 3)(x), expected)


def test_progressive_enhancement_of_no_steps_is_the_identity():
    x = torch.randn(2, C, 3, 4)
    assert torch.equal(ProgressiveEnhancement(C, 0)(x), x)


def test_multiscale_fusion_formula():
    p3, p4, p5 = pyramid()

    def up(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def down(x):
        return F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))

    small, medium, large = SmartMultiscaleFusion()([p3, p4, p5])
    torch.testing.assert_close(small, p3 + 0.3 * up(p4))
    torch.testing.assert_close(medium, p4 + 0.2 * down(p3) + 0.2 * up(p5))
    torch.testing.assert_close(large, p5 + 0.3 * down(p4))


@pytest.mark.parametrize("height", range(1, 8))
def test_area_downsampling_keeps_the_mean_of_what_each_pixel_covers(height):
    x = torch.randn(1, 1, height, height + 1)
    small = area_downsample(x)
    assert small.shape[2:] == ((height + 1) // 2, (height + 2) // 2)
    for i in range(small.shape[2]):
        for j in range(small.shape[3]):
            covered = x[0, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            torch.testing.assert_close(small[0, 0, i, j], covered.mean())


def test_scene_complexity_is_a_score_per_image_that_can_learn():
    """A few steps must separate busy images from empty ones."""
    module = SceneComplexity(BACKBONE)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    busy = torch.tensor([1.0, 0.0, 1.0, 0.0])
    feats = [x * (0.2 + busy.view(-1, 1, 1, 1)) for x in pyramid(4, channels=BACKBONE)]
    for _ in range(30):
        optimizer.zero_grad()
        F.binary_cross_entropy(module(feats), busy).backward()
        optimizer.step()
    scores = module(feats)
    assert scores.shape == (4,) and ((scores > 0) & (scores < 1)).all()
    assert ((scores > 0.5).float() == busy).all()
    assert module.monitor()["complexity_max"] == pytest.approx(scores.max().item())


class Counting(nn.Module):
    """Doubles its input and remembers the batch sizes it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return 2 * x


def test_contextual_sharing_formula_and_open_start():
    module = ContextualSharing(Counting())
    x, complexity = torch.randn(3, C, 4, 5), torch.tensor([0.1, 0.5, 0.9])
    y = module(x, complexity)
    gate = module.gate(complexity)
    assert (gate > 0.9).all()
    torch.testing.assert_close(y, x + gate.view(-1, 1, 1, 1) * x)
    assert module.monitor() == {"gate": pytest.approx(gate.mean().item())}


@pytest.fixture
def divided():
    """A gate that is wide open for complex scenes and shut for easy ones, with skipping switched on."""
    module = ContextualSharing(Counting(), skip_below=0.5)
    module.slope.data.fill_(40.0)
    module.bias.data.zero_()
    return module


@pytest.mark.parametrize("complexity", [[0.1, 0.9, 0.2], [0.1, 0.1, 0.1], [0.9, 0.9, 0.9]])
def test_skipping_is_per_image_and_changes_next_to_nothing(divided, complexity):
    x, complexity = torch.randn(3, C, 4, 5), torch.tensor(complexity)
    full = divided.train()(x, complexity)
    assert divided.block.seen == [3]
    skipped = divided.eval()(x, complexity)
    needed = int((complexity > 0.5).sum())
    assert divided.block.seen[1:] == [needed] * (needed > 0)
    torch.testing.assert_close(skipped, full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(skipped[complexity < 0.5], x[complexity < 0.5], atol=0, rtol=0)


def test_skipping_is_a_key_of_the_config():
    cfg = load_config("v2_ultra", ["model.dynamic_sharing=true"]).model
    assert [m.skip_below for m in build_model(cfg).context] == [None] * 3
    cfg.sharing_skip_below = 0.3
    model = build_model(cfg)
    assert [m.skip_below for m in model.context] == [0.3] * 3
    cfg.sharing_skip_below = 0.999  # skips every image
    macs = [count_macs(build_model(c), (64, 64)) for c in (cfg, replace(cfg, sharing_skip_below=0.0))]
    assert macs[0] == macs[1]
    assert [m.skip_below for m in stop_skipping(model).context] == [None] * 3
    with pytest.raises(ConfigError, match="needs dynamic_sharing"):
        load_config("v2_ultra", ["model.sharing_skip_below=0.3"])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_nothing_is_skipped_by_default_nor_in_a_trace(divided):
    x, complexity = torch.randn(3, C, 4, 5), torch.tensor([0.1, 0.9, 0.2])
    plain = ContextualSharing(Counting()).eval()
    plain(x, torch.zeros(3))
    assert plain.block.seen == [3]
    torch.jit.trace(divided.eval(), (x, complexity), check_trace=False)
    assert list(map(int, divided.block.seen)) == [3]


# --- plan A -----------------------------------------------------------------------------------------------------


def close(before, after):
    """Relative size of what a module changed."""
    before, after = torch.cat([x.flatten() for x in before]), torch.cat([x.flatten() for x in after])
    return ((after - before).norm() / before.norm()).item()


@pytest.mark.parametrize(
    "name, tolerance",
    [
        ("AdaptiveContextFusion", 0.15),
        ("DynamicChannelAllocation", 0.15),
        ("ProgressiveFeatureRefinement", 0.15),
        ("SmartHead_Fusion", 0.15),
        ("CascadeRefinement", 0.15),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_starts_near_the_identity(name, tolerance, training):
    make, call = MODULES[name]
    module, levels = make().train(training), pyramid(4)
    before = predictions(levels).values() if name == "CascadeRefinement" else levels
    after = list(call(module, levels, torch.rand(4)))
    before = list(before) * (len(after) // len(before))
    assert 0 < close(before, after) < tolerance


def test_cbam_cascade_starts_near_its_own_cbams():
    module, levels = cascade(), [x.relu() for x in pyramid(4)]
    first = [cbam(x) for cbam, x in zip(module.cbams, levels)]
    for after in module(levels):
        assert 0 < close(first, after) < 0.2


def test_multipath_starts_near_the_full_path():
    paths, levels = Paths(), pyramid(4)
    out = paths(levels)
    assert 0 < close([out[6]], [out[0]]) < 0.1
    assert 0 < close(out[7:9], out[1:3]) < 0.2


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_acf_formula(size):
    module, (p3, p4, p5) = AdaptiveContextFusion(C).eval(), pyramid(1, size)
    nn.init.normal_(module.base)
    nn.init.normal_(module.slope)
    complexity = torch.tensor([0.8])
    w = torch.softmax(module.base + module.slope * 0.3, 1)
    p4_up = p4.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : p3.shape[2], : p3.shape[3]]
    p5_up = p5.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., : p3.shape[2], : p3.shape[3]]
    p3_down = area_downsample(p3)
    p5_mid = p5.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : p4.shape[2], : p4.shape[3]]
    contexts = [
        w[0, 0] * p3 + w[0, 1] * p4_up + w[0, 2] * p5_up,
        w[1, 0] * p3_down + w[1, 1] * p4 + w[1, 2] * p5_mid,
        w[2, 0] * area_downsample(p3_down) + w[2, 1] * area_downsample(p4) + w[2, 2] * p5,
    ]
    for out, x, context in zip(module([p3, p4, p5], complexity), (p3, p4, p5), contexts):
        enhanced = F.conv2d(context, module.depthwise.weight, padding=1, groups=C) / (1 + 1e-5) ** 0.5
        torch.testing.assert_close(out, x + 0.1 * enhanced, atol=1e-5, rtol=1e-4)
    rows = module.weights(torch.rand(5)).sum(2)
    torch.testing.assert_close(rows, torch.ones(5, 3))


def test_dca_starts_as_the_identity_but_for_the_scene():
    module, levels = DynamicChannelAllocation(C), pyramid()
    nn.init.zeros_(module.excite.weight)
    for a, b in zip(module(levels, torch.full((2,), 0.5)), levels):
        torch.testing.assert_close(a, b)
    assert (module.utilisation() == 1).all()


def test_dca_keeps_more_channels_live_for_complex_scenes():
    module, level = DynamicChannelAllocation(C), pyramid(1)
    nn.init.normal_(module.bias, -module.OPEN, 0.5)
    nn.init.constant_(module.slope, 2.0)
    levels = [x.expand(3, -1, -1, -1) for x in level]
    module(levels, torch.tensor([0.0, 0.5, 1.0]))
    live = module.utilisation()
    assert live.shape == (3, 3)
    assert (live[0] < live[1]).all() and (live[1] < live[2]).all()
    nn.init.constant_(module.slope, -50.0)  # however it is trained, complexity never takes channels away
    module(levels, torch.tensor([0.0, 0.5, 1.0]))
    assert (module.utilisation()[2] >= module.utilisation()[0]).all()


def test_contrast_singles_out_the_channel_with_a_peak():
    x = torch.full((1, 4, 5, 5), 0.5)
    x[0, 2, 1, 1] = 8.0
    assert contrast(x)[0].argmax() == 2
    torch.testing.assert_close(contrast(x)[0, [0, 1, 3]], torch.full((3,), -1.0))
    assert (contrast(x[..., :1, :1]) == -1).all()


def test_pfr_refines_only_where_quality_is_high():
    module = ProgressiveFeatureRefinement(C).eval()
    x = torch.randn(1, C, 6, 6)
    x[:, 0] = -100.0
    x[:, 0, :, 3:] = 100.0
    nn.init.zeros_(module.quality.weight)
    module.quality.weight.data[0, 0] = 1.0
    change = (module([x, x, x])[0] - x).abs()
    assert change[:, 1:, :, :3].max() < 1e-6
    assert change[:, 1:, :, 3:].mean() > 1e-3


def test_each_sub_switch_of_bifpn_ultra_adds_its_own_module_and_keeps_the_interface():
    feats = pyramid(channels=BACKBONE)
    bifpn = BiFPN(BACKBONE, C, 2)
    complexity = torch.rand(2)
    with torch.no_grad():
        repeats, laterals = bifpn.eval()(feats)
        costs = {}
        for on in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            neck = BiFPN_Ultra(bifpn, C, *map(bool, on)).eval()
            costs[on] = parameters(neck) - parameters(bifpn)
            got, same = neck(feats, complexity)
            torch.testing.assert_close(same, laterals)
            torch.testing.assert_close(got[0], repeats[0])
            assert [x.shape for x in got[1]] == [x.shape for x in repeats[1]]
            assert torch.equal(got[1][0], repeats[1][0]) == (on == (0, 0, 0))
    assert costs[0, 0, 0] == 0
    assert sum(v for on, v in costs.items() if sum(on) == 1) == costs[1, 1, 1]


def test_second_stage_of_the_cascade_sees_the_neighbouring_levels():
    module, levels = cascade().eval(), pyramid(1)
    before, _ = module.attend(levels)
    after, maps = module.attend([levels[0], levels[1], levels[2] + 5])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert [m.shape[1:] for m in maps] == [(1, 16, 24), (1, 8, 12), (1, 4, 6)]


@pytest.mark.parametrize("moved, affected", [(0, {0, 1, 2}), (1, {0, 1, 2}), (2, {0, 2})])
def test_smart_head_helps_along_the_ring(moved, affected):
    module = SmartHead_Fusion(C).eval()
    tasks = [pyramid(1) for _ in range(3)]
    before = module(*tasks)
    tasks[moved] = [x + 1 for x in tasks[moved]]
    after = module(*tasks)
    assert {t for t in range(3) if not torch.equal(before[t][1], after[t][1])} == affected


def test_smart_head_takes_one_list_for_all_tasks():
    module, levels = SmartHead_Fusion(C).eval(), pyramid(1)
    for a, b in zip(flat(module(levels)), flat(module(levels, levels, levels))):
        assert torch.equal(a, b)


def test_refinement_learns_from_the_coarse_prediction_but_does_not_train_it():
    module, levels = CascadeRefinement(C, ANCHORS), pyramid()
    coarse = {k: v.requires_grad_() for k, v in predictions([x.clone() for x in levels]).items()}
    refined = module(coarse, levels)
    assert {k: v.shape for k, v in refined.items()} == {k: v.shape for k, v in coarse.items()}
    sum(v.sum() for v in refined.values()).backward()
    assert all(v.grad is None for v in coarse.values())
    assert module.from_coarse.weight.grad.abs().sum() > 0


def test_refinement_keeps_the_order_of_anchors_with_unequal_counts():
    """Changing one coarse prediction changes that anchor alone."""
    counts = [3, 2, 1]
    module, levels = CascadeRefinement(C, counts).eval(), pyramid(1)
    n = sum(c * x.shape[2] * x.shape[3] for c, x in zip(counts, levels))
    coarse = {"logits": torch.randn(1, n), "boxes": torch.randn(1, n, 4), "landmarks": torch.randn(1, n, 10)}
    before = module(coarse, levels)["boxes"]
    for anchor in (0, 4, n - 1):
        moved = {k: v.clone() for k, v in coarse.items()}
        moved["boxes"][0, anchor, 0] += 1
        after = module(moved, levels)["boxes"]
        assert (after != before).any(2)[0].nonzero().flatten().tolist() == [anchor]
    # a change of one cell's feature changes exactly the anchors of that cell
    cell = [x.clone() for x in levels]
    cell[1][0, :, 2, 5] += 1
    first = counts[0] * levels[0].shape[2] * levels[0].shape[3] + counts[1] * (2 * levels[1].shape[3] + 5)
    after = module(coarse, cell)["boxes"]
    assert (after != before).any(2)[0].nonzero().flatten().tolist() == [first, first + 1]


def test_multipath_is_the_weighted_average_of_its_paths():
    levels, heads = pyramid(1), Heads(C, ANCHORS)
    main, module = heads(levels, levels, levels), MultiPath(C, 2).eval()
    earlier = [pyramid(1), pyramid(1)]
    out, paths = module(main, earlier, heads)
    assert len(paths) == 3 and paths[-1] is main
    w = torch.softmax(torch.tensor([0.0, 0.0, 3.0]), 0)
    torch.testing.assert_close(module.monitor()["full_path"], w[2].item())
    for key in main:
        torch.testing.assert_close(out[key], sum(wi * p[key] for wi, p in zip(w, paths)))
    adapted = [F.relu(x / (1 + 1e-5) ** 0.5) for x in earlier[0]]  # the adapter starts as the identity
    torch.testing.assert_close(paths[0]["logits"], heads(adapted, adapted, adapted)["logits"])


def test_the_middle_level_of_the_cascade_sees_the_mean_of_its_neighbours(monkeypatch):
    class Plain(torch.nn.Module):
        def with_map(self, x):
            return x, x[:, :1]

    seen = []
    monkeypatch.setattr(CBAM_Cascade, "_contextual", lambda self, x, around, norm: seen.append(around) or x)
    levels = [torch.full((1, 4, side, side), value) for side, value in ((8, 1.0), (4, 10.0), (2, 5.0))]
    CBAM_Cascade([Plain() for _ in range(3)], 4).attend(levels)
    assert [around.unique().tolist() for around in seen] == [[10], [3], [10]]


def test_what_is_remembered_holds_no_graph():
    """Else the activations of a whole step would stay in memory until the next."""
    module = Monitored()
    module.remember(gate=torch.ones(2, requires_grad=True) * 2)
    assert not module._seen["gate"].requires_grad


def shaken(module):
    """In eval mode, every parameter and batch-norm statistic with a value of its own."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return module.requires_grad_(False).eval()


def test_cascade_formula():
    module, levels = shaken(cascade()), pyramid()
    attended, tasks = module.attend(levels)[0], module(levels)
    p3, p4, p5 = first = [cbam(x) for cbam, x in zip(module.cbams, levels)]
    around = [upsample(p4, p3), (area_downsample(p3) + upsample(p5, p4)) / 2, area_downsample(p4)]
    for i, (x, near) in enumerate(zip(first, around)):
        pooled = torch.cat([x.mean((2, 3)), near.mean((2, 3))], 1)
        channel = 2 * torch.sigmoid(module.excite(F.silu(module.squeeze(pooled))))[..., None, None]
        planes = torch.stack([x.amax(1), x.mean(1), near.mean(1)], 1)
        x = x * channel * 2 * torch.sigmoid(module.norms[i](module.spatial(planes)))
        torch.testing.assert_close(attended[i], x)
        channel = 2 * torch.sigmoid(module.task_excite(F.silu(module.task_squeeze(x.mean((2, 3))))))
        planes = module.task_spatial(torch.stack([x.amax(1), x.mean(1)], 1))
        spatial = 2 * torch.sigmoid(module.task_norms[i](planes))
        for t, own in enumerate(channel.chunk(3, 1)):
            torch.testing.assert_close(tasks[t][i], x * own[..., None, None] * spatial[:, t : t + 1])


def test_smart_head_formula():
    module, (classes, boxes, landmarks) = shaken(SmartHead_Fusion(C)), [pyramid() for _ in range(3)]

    def helped(transfer, x, level):
        return transfer.up(F.relu(transfer.norms[level](transfer.down(x))))

    for i, out in enumerate(zip(*module(classes, boxes, landmarks))):
        b = boxes[i] + helped(module.class_to_box, classes[i], i)
        m = landmarks[i] + helped(module.box_to_landmark, b, i)
        c = classes[i] + helped(module.landmark_to_class, m, i)
        for got, expected in zip(out, (c, b, m)):
            torch.testing.assert_close(got, expected)


def test_refinement_formula():
    module, levels = shaken(CascadeRefinement(C, ANCHORS)), pyramid()
    coarse = predictions([x.roll(1, 0) for x in levels])
    known = torch.cat([coarse["logits"][..., None], coarse["boxes"], coarse["landmarks"]], 2)
    expected, start = [], 0
    for x, norm in zip(levels, module.norms):
        cells = module.from_feature(x.flatten(2).transpose(1, 2)).repeat_interleave(2, 1)
        part = known[:, start : (start := start + cells.shape[1])]
        hidden = (cells + module.from_coarse(part)).unflatten(1, (-1, 2)).flatten(2)  # the anchors of a cell together
        hidden = F.relu(norm(hidden.transpose(1, 2))).transpose(1, 2).unflatten(2, (2, -1)).flatten(1, 2)
        expected.append(part + module.out(hidden))
    out = module(coarse, levels)
    got = torch.cat([out["logits"][..., None], out["boxes"], out["landmarks"]], 2)
    torch.testing.assert_close(got, torch.cat(expected, 1))


def test_every_task_of_an_earlier_path_reads_the_adapted_levels():
    levels, heads, module = pyramid(1), shaken(Heads(C, ANCHORS)), shaken(MultiPath(C, 2))
    earlier = [pyramid(1), pyramid(1)]
    _, paths = module(heads(levels, levels, levels), earlier, heads)
    for repeat, norms, path in zip(earlier, module.norms, paths):
        adapted = [F.relu(norm(module.depthwise(x))) for x, norm in zip(repeat, norms)]
        for key, value in heads(adapted, adapted, adapted).items():
            torch.testing.assert_close(path[key], value)


def test_dca_formula():
    module, levels, complexity = shaken(DynamicChannelAllocation(C)), pyramid(), torch.tensor([0.1, 0.8])
    for i, (out, x) in enumerate(zip(module(levels, complexity), levels)):
        need = (F.softplus(module.slope[i]) * (complexity - 0.5))[:, None]
        logits = 2 + module.bias[i] + module.excite(F.silu(module.squeeze(x.abs().mean((2, 3))))) + need
        gate = torch.sigmoid(logits) / torch.sigmoid(torch.tensor(2.0))
        torch.testing.assert_close(out, x * gate[..., None, None])


def test_pfr_formula():
    module, levels = shaken(ProgressiveFeatureRefinement(C)), pyramid()
    assert len(module.norms) == 2
    for i, (out, x) in enumerate(zip(module(levels), levels)):
        for norms in module.norms:
            amplify = 2 * torch.sigmoid(module.gain * contrast(x) + module.bias)
            refined = norms[i](module.depthwise(F.silu(x)))
            x = x + torch.sigmoid(module.quality(x)) * amplify[..., None, None] * refined
        torch.testing.assert_close(out, x)


def test_contrast_heeds_the_size_of_a_peak_and_not_its_sign():
    x = torch.randn(1, 4, 5, 5)
    x[0, 2, 1, 1] = -8.0
    assert contrast(x)[0].argmax() == 2
    torch.testing.assert_close(contrast(x), contrast(-x))


def test_scene_complexity_formula():
    module, feats = shaken(SceneComplexity([6, 8, 4], bins=4)), pyramid(channels=(6, 8, 4))
    assert module.bins == [3, 4, 4]  # neighbouring channels are averaged, by two here
    means = [x.abs().mean((2, 3)) for x in feats]
    means = [(means[0][:, ::2] + means[0][:, 1::2]) / 2, (means[1][:, ::2] + means[1][:, 1::2]) / 2, means[2]]
    logits = torch.cat(means, 1) @ module.project.weight[0] + module.project.bias
    torch.testing.assert_close(module(feats), torch.sigmoid(logits))


def test_attention_amplification_gives_the_mean_of_its_maps():
    module, x = shaken(AttentionAmplification(CBAM(C, 64), 3)), torch.randn(2, C, 9, 5)
    total, maps = x, []
    for use in module.uses:
        channel, spatial = use.gates(total)
        total = total + total * channel * spatial
        maps.append(spatial)
    torch.testing.assert_close(module.with_map(x)[1], (maps[0] + maps[1] + maps[2]) / 3)


def test_an_image_that_is_not_skipped_is_mixed_by_its_gate(divided):
    divided.slope.data.fill_(2.0)  # no gate is wide open
    x, complexity = torch.randn(3, C, 4, 5), torch.tensor([0.1, 0.6, 0.9])
    expected = x * (1 + divided.gate(complexity))[:, None, None, None]
    expected[0] = x[0]
    torch.testing.assert_close(divided.eval()(x, complexity), expected)
