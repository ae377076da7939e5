"""Affinities: estimates on worlds whose answer is known, the vote, files, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    MobileViTImageProcessor,
)

import tiny
from guidekit import GuidekitError, LabelMap, LabelSet
from guidekit.affinity import (
    Affinity,
    Estimate,
    Shot,
    by_features,
    by_segmentation,
    by_text,
    estimate,
    load_affinity,
    read_shots,
)
from guidekit.affinity.encoders import (
    denoiser_features,
    load_texts,
    pipeline_texts,
    timm_features,
)
from guidekit.affinity.matrix import parse_hand
from guidekit.affinity.report import matrix_image, summary
from guidekit.affinity.segmenters import Segmenter, judge_segmenter, load_segmenter
from guidekit.backbones.denoiser import Denoiser
from guidekit.images import to_image
from guidekit.labels import VOID
from guidekit.train.judge import Judge
from segformers import write_segformer

NAMES = ("red circle", "blue square", "green", "white")
SET = LabelSet("four", NAMES, things=NAMES[:2])
DRAWS = torch.Generator().manual_seed(0)
SHADES = torch.rand(4, 3, generator=DRAWS) * 2 - 1
PIXELS = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def shot(labels=SET, order=range(4), size=16):
    """A random map of blocks, each class in a shade of its own."""
    ids = torch.randint(0, 4, (4, 4), generator=DRAWS).repeat_interleave(4, 0)
    ids = ids.repeat_interleave(4, 1)
    place = torch.tensor(list(order))
    return Shot(SHADES[ids].movedim(-1, 0), LabelMap(place[ids], labels))


SHOTS = [shot() for _ in range(4)]


def see(pixels):
    """The class by the nearest shade."""
    ids = (pixels[None] - SHADES[..., None, None]).square().sum(1).argmin(0)
    return LabelMap(ids, SET).one_hot()


SEGMENTER = Segmenter(SET, see)


def features(pixels):
    """The shades at a quarter of the size, in a space of more channels."""
    wide = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    return F.avg_pool2d(torch.einsum("dc,chw->dhw", wide, pixels), 4)


def texts(words):
    """A code of each word by its letters."""
    rows = [
        torch.randn(32, generator=torch.Generator().manual_seed(sum(map(ord, w)))) for w in words
    ]
    return torch.stack(rows)


def whole(**options):
    given = {"segmenter": SEGMENTER, "texts": texts, "features": features, "source_shots": SHOTS}
    return estimate(SHOTS, SET, **given | options)


def test_a_set_with_itself_is_the_identity():
    found = whole()
    for by in ("segmentation", "features", "text", "vote"):
        assert torch.equal(found.hard(by), torch.arange(4))
        assert torch.equal(found.matrix(by), torch.eye(4).double())
    assert [vote.how for vote in found.votes()] == ["unanimous"] * 4
    soft = found.soft(0.01)
    torch.testing.assert_close(soft.sum(0), torch.ones(4).double())
    assert (soft.diagonal() > 0.9).all()


def test_names_in_another_order_leave_what_images_say():
    """Classes permuted in the target: what pixels say is permuted, what names say too."""
    order = [2, 0, 3, 1]
    target = LabelSet("other", tuple(NAMES[order.index(i)] for i in range(4)))
    shots = [Shot(s.pixels, LabelMap(torch.tensor(order)[s.map.ids], target)) for s in SHOTS]
    found = estimate(shots, SET, segmenter=SEGMENTER, features=features, source_shots=SHOTS)
    inverse = torch.tensor([order.index(i) for i in range(4)])
    for by in ("segmentation", "features"):
        assert torch.equal(found.hard(by), inverse)


def test_counts_are_pooled_and_void_counts_for_nothing():
    ids = SHOTS[0].map.ids.clone()
    ids[:, :8] = VOID
    half = Shot(SHOTS[0].pixels, LabelMap(ids, SET))
    found = by_segmentation([half, SHOTS[1]], SEGMENTER, SET)
    both = torch.bincount(ids[ids >= 0], minlength=4) + torch.bincount(
        SHOTS[1].map.ids.flatten(), minlength=4
    )
    assert torch.equal(found.scores, torch.diag(both).double())
    assert torch.equal(found.evidence, both.double())
    blind = Segmenter(SET, lambda pixels: torch.zeros(len(SET), *pixels.shape[1:]))
    silent = Affinity(SET, SET, {"segmentation": by_segmentation(SHOTS, blind, SET)})
    assert silent.picks("segmentation").tolist() == [VOID] * 4
    with pytest.raises(GuidekitError, match="nothing says what stands for 'red circle'"):
        silent.hard()


def test_unseen_classes_abstain():
    """Class 3 is in no shot: images say nothing of it, its name does."""
    shots = [Shot(s.pixels, LabelMap(s.map.ids.where(s.map.ids != 3, VOID), SET)) for s in SHOTS]
    found = estimate(
        shots, SET, segmenter=SEGMENTER, texts=texts, features=features, source_shots=SHOTS
    )
    assert found.picks("segmentation")[3] == VOID
    assert found.picks("features")[3] == VOID
    vote = found.votes()[3]
    assert (vote.how, vote.to, set(vote.named)) == ("alone", 3, {"text"})


def test_a_class_that_no_source_shot_shows_is_never_named():
    shots = [Shot(s.pixels, LabelMap(s.map.ids.where(s.map.ids != 3, VOID), SET)) for s in SHOTS]
    found = by_features(SHOTS, shots, features, SET)
    assert (found.scores[3] == float("-inf")).all()
    own = Affinity(SET, SET, {"features": found})
    assert 3 not in own.hard()
    assert not own.soft()[3].any()


def of_classes(shots, *kept):
    """The shots with all other classes void."""
    return [
        Shot(
            s.pixels,
            LabelMap(s.map.ids.where(torch.isin(s.map.ids, torch.tensor(kept)), VOID), SET),
        )
        for s in shots
    ]


def test_features_without_evidence_abstain():
    """One class has nothing to be told from; things of shots of stuff alone stand for nothing."""
    for ours, theirs in [((1,), range(4)), (range(4), (1,)), ((), range(4)), (range(4), ())]:
        given = of_classes(SHOTS, *ours), of_classes(SHOTS, *theirs)
        found = Affinity(SET, SET, {"features": by_features(*given, features, SET)})
        assert found.picks("features").tolist() == [VOID] * 4
        assert not found.said().any()
        text = by_text(texts, SET, SET)
        both = replace(found, estimates=found.estimates | {"text": text})
        assert torch.equal(both.hard(), torch.arange(4))
        assert torch.equal(both.soft(), both.soft(by="text"))
    stuff = by_features(SHOTS, of_classes(SHOTS, 2, 3), features, SET)
    found = Affinity(SET, SET, {"features": stuff})
    assert found.picks("features").tolist() == [VOID, VOID, 2, 3]
    assert [vote.how for vote in found.votes()] == ["none", "none", "alone", "alone"]
    assert torch.equal(found.said().sum(0), torch.tensor([0, 0, 1, 1]).double())


def test_features_are_centred_by_the_side():
    """Another light on all images of a side changes nothing."""
    plain = by_features(SHOTS, SHOTS, features, SET).scores
    lit = [replace(s, pixels=s.pixels + 0.7) for s in SHOTS]
    torch.testing.assert_close(by_features(lit, SHOTS, features, SET).scores, plain)


def table(rows, evidence=None, counts=False):
    scores = torch.tensor(rows, dtype=torch.float64)
    given = torch.ones(scores.shape[1]) if evidence is None else torch.tensor(evidence)
    return Estimate(scores, given.double(), counts)


ABC = LabelSet("abc", ("a", "b", "c"))
XY = LabelSet("xy", ("x", "y"))
SAYS_A = table([[1, 0], [0, 0], [0, 0.1]])
SAYS_B = table([[0, 0], [1, 0.3], [0, 0]])


def test_the_vote_and_its_order():
    found = Affinity(ABC, XY, {"text": SAYS_A, "segmentation": SAYS_B, "features": SAYS_B})
    assert [(v.to, v.how) for v in found.votes()] == [(1, "voted"), (1, "voted")]
    two = Affinity(ABC, XY, {"text": SAYS_A, "segmentation": SAYS_B})
    assert [(v.to, v.how) for v in two.votes()] == [(1, "ordered"), (1, "ordered")]
    turned = replace(two, order=("text", "segmentation"))
    assert turned.hard().tolist() == [0, 2]
    assert [v.how for v in Affinity(ABC, XY, {"text": SAYS_A}).votes()] == ["alone", "alone"]
    even = Affinity(ABC, XY, {"text": SAYS_A, "features": SAYS_A, "more": SAYS_B, "other": SAYS_B})
    assert even.hard().tolist() == [0, 2]  # two against two: the first in the order


def test_by_hand_always_wins():
    hand = parse_hand({"x": "c", "y": {"a": 3, "b": 1}}, ABC, XY, "hand")
    found = Affinity(ABC, XY, {"text": SAYS_B, "features": SAYS_B}, hand)
    assert [(v.to, v.how) for v in found.votes()] == [(2, "by hand"), (0, "by hand")]
    assert found.hard("text").tolist() == [2, 0]
    assert found.soft()[:, 1].tolist() == [0.75, 0.25, 0.0]


def test_things_go_to_things():
    source = replace(ABC, things=("a",))
    target = replace(XY, things=("x",))
    found = Affinity(source, target, {"text": table([[0, 9], [9, 1], [1, 2]])})
    assert found.hard().tolist() == [0, 2]
    assert replace(found, by_kind=False).hard().tolist() == [1, 0]
    none = replace(found, source=replace(ABC, things=()))
    assert none.hard().tolist() == [1, 0]  # where there are no things all may stand for x


def test_soft_is_shares_of_counts_and_softmax_of_similarities():
    counts = table([[3.0, 0], [1, 0], [0, 2]], counts=True)
    assert Affinity(ABC, XY, {"segmentation": counts}).soft()[:, 0].tolist() == [0.75, 0.25, 0]
    found = Affinity(ABC, XY, {"text": SAYS_A}).soft(0.5)
    torch.testing.assert_close(found, (SAYS_A.scores / 0.5).softmax(0))


def test_remap_keeps_void_and_asks_only_for_what_is_there():
    found = Affinity(ABC, XY, {"text": table([[0, 0], [1, 0], [0, 1]], [1.0, 0.0])})
    ids = torch.tensor([[0, VOID], [0, 0]])
    assert found.remap(LabelMap(ids, XY)).ids.tolist() == [[1, VOID], [1, 1]]
    with pytest.raises(GuidekitError, match="nothing says what stands for 'y' of 'xy'"):
        found.remap(LabelMap(ids + 1, XY))
    with pytest.raises(GuidekitError, match="is of label set 'abc'.*is for 'xy'"):
        found.remap(LabelMap(ids, ABC))


def test_files_hold_all_of_it(tmp_path):
    hand = parse_hand({"white": "green"}, SET, SET, "hand")
    found = whole(by_hand=hand)
    again = load_affinity(found.save(tmp_path / "A"))
    assert again.table() == found.table()
    assert torch.equal(again.hard(), found.hard())
    for name, own in found.estimates.items():
        assert torch.equal(again.estimates[name].scores, own.scores)
    shares = load_file(tmp_path / "A/affinity.safetensors")
    for by in (*found.estimates, "vote"):
        assert torch.equal(shares[f"{by}.soft"], found.soft(by=by))
    image = matrix_image(again)
    assert image.width == image.height > 150
    lines = summary(again)
    assert lines[0] == "votes    unanimous 3, by hand 1"
    assert lines[4].startswith("class    white <- green (by hand: segmentation white")
    (tmp_path / "A/affinity.json").write_text("{}")
    with pytest.raises(GuidekitError, match="has another format; estimate it again"):
        load_affinity(tmp_path / "A")
    with pytest.raises(GuidekitError, match="is no affinity"):
        load_affinity(tmp_path)


def saved(folder, labels):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i, one in enumerate(SHOTS):
        values = ((one.pixels.movedim(0, -1) + 1) * 127.5).round().byte().numpy()
        Image.fromarray(values).save(folder / f"images/{i}.png")
        Image.fromarray(one.map.ids.byte().numpy()).save(folder / f"masks/{i}.png")
    labels.save(folder / "classes.json")
    return folder


def test_shots_of_a_folder(tmp_path):
    found = read_shots(saved(tmp_path / "shots", SET))
    assert len(found) == 4
    assert found[0].map.labels == SET
    assert torch.equal(found[2].map.ids, SHOTS[2].map.ids)
    assert torch.equal(estimate(found, SET, segmenter=SEGMENTER).hard(), torch.arange(4))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "shots/masks/0.png")
    with pytest.raises(GuidekitError, match="has 8x8 pixels, its image 16x16"):
        found[0]
    (tmp_path / "shots/masks/1.png").unlink()
    with pytest.raises(GuidekitError, match="'1' lacks image or mask"):
        read_shots(tmp_path / "shots")
    (tmp_path / "shots/classes.json").unlink()
    with pytest.raises(GuidekitError, match="has no classes.json"):
        read_shots(tmp_path / "shots")


def test_shares_are_pooled_where_every_pixel_is_most_likely_void():
    """Half of a pixel is void, a third its own class: the class is known still."""
    rest = torch.full((4, 4), 1 / 18).fill_diagonal_(1 / 3)
    unsure = Segmenter(SET, lambda pixels: torch.einsum("ab,bhw->ahw", rest, see(pixels)))
    found = by_segmentation(SHOTS, unsure, SET)
    pixels = torch.stack([shot.map.one_hot() for shot in SHOTS]).sum((0, 2, 3)).double()
    torch.testing.assert_close(found.scores, rest.double() * pixels, rtol=1e-6, atol=0)
    assert Affinity(SET, SET, {"segmentation": found}).hard("segmentation").tolist() == [0, 1, 2, 3]


def probable(folder):
    """Probabilities (N, h, w) of PIXELS' classes by a model of transformers."""
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=to_image(PIXELS / 2 + 0.5), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0].softmax(0)


def test_a_processors_crop_is_left_out(tmp_path):
    """What differs only at the sides of a wide image is seen."""
    folder = write_segformer(tmp_path, ("background", "sky", "grass"))
    side = {"shortest_edge": 32}
    crop = {"height": 32, "width": 32}
    MobileViTImageProcessor(size=side, crop_size=crop).save_pretrained(folder)
    segmenter, wide = load_segmenter(folder), PIXELS.repeat(1, 1, 2)
    other = wide.clone()
    other[..., :16] = -other[..., :16]
    assert not torch.equal(segmenter(wide), segmenter(other))


def test_a_segmenter_that_sees_next_to_nothing_abstains():
    """A pixel in a hundred thousand is no evidence: the name decides."""
    faint = Segmenter(SET, lambda pixels: see(pixels) * 1e-5)
    found = whole(segmenter=faint)
    assert found.picks("segmentation").tolist() == [VOID] * 4
    assert all("segmentation" not in vote.named for vote in found.votes())
    evidence = found.table()["votes"][NAMES[0]]["evidence"]["segmentation"]
    pixels = torch.stack([shot.map.one_hot()[0] for shot in SHOTS]).sum()
    assert evidence == pytest.approx(1e-5 * float(pixels), rel=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pixels: see(pixels)[:1],  # of fewer classes
        lambda pixels: see(pixels).argmax(0),  # classes
        lambda pixels: see(pixels) * torch.nan,
        lambda pixels: see(pixels).numpy() * 7 - 3,  # no probabilities
        lambda pixels: torch.ones(4, 2, 2),  # that sum to more than 1
    ],
)
def test_a_segmenter_that_gives_no_probabilities_is_refused(wrong):
    refused("give probabilities \\(4, h, w\\)", by_segmentation, SHOTS, Segmenter(SET, wrong), SET)


def test_shares_of_another_size_count_in_pixels():
    """Cells of 4 pixels, which are the blocks that the shots are made of."""
    coarse = Segmenter(SET, lambda pixels: F.avg_pool2d(see(pixels), 4))
    expected = by_segmentation(SHOTS, SEGMENTER, SET)
    assert torch.equal(by_segmentation(SHOTS, coarse, SET).scores, expected.scores)


def test_a_judge_and_a_model_of_transformers_segment(tmp_path):
    torch.manual_seed(0)
    judge, pixels = Judge(8, 5), PIXELS
    found = judge_segmenter(judge, SET)(pixels)
    expected = judge.eval()(pixels[None])[0][0].softmax(0)[1:]
    assert torch.equal(found, expected)
    judge.save_pretrained(tmp_path / "judge")
    with pytest.raises(GuidekitError, match="has no labels.json"):
        load_segmenter(tmp_path / "judge")
    SET.save(tmp_path / "judge/labels.json")
    assert torch.equal(load_segmenter(tmp_path / "judge")(pixels), expected)
    names = ("background", "sky", "grass")
    folder = write_segformer(tmp_path / "segformer", names)
    segmenter = load_segmenter(folder)
    assert segmenter.labels.classes == ("sky", "grass")
    found = segmenter(pixels)
    assert torch.equal(found, probable(folder)[1:])


def test_a_pipelines_clip_and_a_denoiser_and_timm_are_asked():
    pipe = tiny.sd_pipeline()
    for own in (pipe, tiny.sdxl_pipeline()):
        found = by_text(pipeline_texts(own), SET, SET, "a {}")
        torch.testing.assert_close(found.scores.diagonal(), torch.ones(4).double())
    clip = load_texts("scenes-clip", None)(["a red circle", "a blue square", "a red circle"])
    assert torch.equal(clip[0], clip[2])
    assert not torch.equal(clip[0], clip[1])
    maps = denoiser_features(Denoiser(pipe))(torch.zeros(3, 32, 32))
    assert maps.ndim == 3
    assert maps.shape[0] in (32, 64)
    import timm

    model = timm.create_model("resnet10t", pretrained=False, features_only=True, out_indices=(-2,))
    see_all, wide = timm_features(model), torch.zeros(3, 32, 64)
    assert see_all(torch.zeros(3, 32, 32)).ndim == 3
    sides = wide.clone()
    sides[..., :8] = 1.0  # in no square from the middle
    assert not torch.equal(see_all(sides), see_all(wide))


def test_names_without_letters_abstain():
    target = LabelSet("numbers", ("1", "2", "green", "4"))
    found = by_text(texts, SET, target)
    assert found.evidence.tolist() == [0, 0, 1, 0]


def refused(text, call, *args, **options):
    with pytest.raises(GuidekitError, match=text) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_what_cannot_work_is_refused(tmp_path):
    refused("nothing to estimate from", estimate, SHOTS, SET)
    refused("there are no shots", estimate, [], SET, texts=texts)
    mixed = [SHOTS[0], Shot(SHOTS[1].pixels, LabelMap(SHOTS[1].map.ids.clamp(max=2), ABC))]
    refused("are labelled with 'abc', not 'four'", estimate, mixed, SET, segmenter=SEGMENTER)
    refused("of one size, not \\(3, 8, 16\\)", Shot, SHOTS[0].pixels[:, :8], SHOTS[0].map)
    refused("tau must be above 0, not 0; for one class each use hard", whole().soft, 0.0)
    refused("lacks {}", by_text, texts, SET, SET, "a")
    refused("the segmenter knows 'four'", estimate, SHOTS, ABC, segmenter=SEGMENTER)
    refused("--source-shots.*are none", estimate, SHOTS, SET, features=features)
    refused("are labelled with 'four', not 'abc'", by_features, SHOTS, SHOTS, features, ABC)
    refused(
        "no estimate 'votes'; there are text", Affinity(ABC, XY, {"text": SAYS_A}).hard, "votes"
    )
    refused("is \\(3, 2\\); these label sets need", Affinity, SET, XY, {"text": SAYS_A})
    refused("does not fit; there are 2 classes", Affinity, ABC, XY, {}, {5: torch.ones(3)})
    refused("no class 'z'", parse_hand, {"z": "a"}, ABC, XY, "hand")
    refused("weights above 0", parse_hand, {"x": {"a": -1}}, ABC, XY, "hand")
    refused("goes to a class, or to", parse_hand, {"x": ["a", "b"]}, ABC, XY, "hand")
    refused("goes to no class", parse_hand, {"x": {}}, ABC, XY, "hand")
    refused("no segmenter 'nowhere'", load_segmenter, "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    refused("is a BertModel; give one of transformers", load_segmenter, tmp_path)
    refused("no CLIP text encoder", pipeline_texts, object())
