"""Captions of several members: each sample has one, in the shares asked for, by its position alone."""

import pytest
import torch

from helpers.data import picture
from ldm.build import build
from ldm.compose import compose_config
from ldm.data.batch.samples import Loaded
from ldm.data.order.order import Place
from ldm.data.shard.write import write_shards
from ldm.data.shards import Shards
from ldm.data.stream import Streamed
from ldm.errors import Refusal

COUNT, SHARES = 8, {"txt": 1, "long.txt": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed") / "shards"
    samples = [
        {"__key__": f"{i}", "jpg": picture(colour=(20 * i, 0, 0)), "txt": f"short {i}", "long.txt": f"long {i}"}
        for i in range(COUNT)
    ]
    write_shards(samples, folder, per_shard=3)
    return folder


def data_of(folder, shares=SHARES, **settings):
    return Shards(folder, folder, {"image": "jpg", "caption": shares}, size=16, batch=4, **settings)


def test_each_sample_has_one_in_its_share_by_its_position(folder):
    """The same whatever batch it stands in, however often it comes again, and another for another seed."""
    data = data_of(folder, seed=3)
    loaded = Loaded(data.train_set, seed=3)
    places = [Place(p, *data.train_set.selection.locate(p % COUNT), 16, 16) for p in range(1200)]
    batch = loaded.__getitems__(places)
    assert set(batch) - {"position", "mirrored"} - {k for k in batch if "_" in k} == {"image", "caption", "key"}
    assert [caption.split()[1] for caption in batch["caption"]] == batch["key"]
    long = torch.tensor([caption.startswith("long") for caption in batch["caption"]]).float()
    assert abs(long.mean() - 0.75) < 4 * (0.75 * 0.25 / 1200) ** 0.5
    alone = [loaded.__getitems__([places[p]])["caption"][0] for p in (1100, 7, 500)]
    assert alone == [batch["caption"][p] for p in (1100, 7, 500)]
    assert Loaded(data.train_set, seed=4).__getitems__(places)["caption"] != batch["caption"]


def test_training_goes_on_with_the_captions_it_would_have_had(folder):
    """From a checkpoint's state; another share is another order of samples, and is refused."""

    def batches(data, count):
        data.setup()
        found = iter(data.train_dataloader())
        return [next(found)["caption"] for _ in range(count)]

    whole, again = data_of(folder), data_of(folder)
    wanted = batches(whole, 6)
    again.load_state_dict(whole.state_dict() | {"consumed": 12, "step": 3})
    assert batches(again, 3) == wanted[3:]
    with pytest.raises(Refusal, match="The checkpoint's samples are not this run's"):
        data_of(folder, {"txt": 1, "long.txt": 1}).load_state_dict(whole.state_dict())
    first = [data.rows("val", range(COUNT))["caption"] for data in (whole, again)]
    assert first[0] == first[1]


def test_it_is_said_on_the_command_line_and_what_means_nothing_is_refused(folder):
    words = ["experiment=emoji/text", "data=shards", f"data.train={folder}", "data.fields.caption={txt:0.5,long.txt:0.5}"]
    data = build(compose_config("train", words).data)
    assert data.mixed == {"caption": {"caption": 0.5, "caption:long.txt": 0.5}}
    for shares, words in (
        ({}, "wanted members with their shares"),
        ({"txt": 1, "jpg": 1}, "jpg is no text"),
        ({"txt": 0.5, "long.txt": 0}, r"the share of long\.txt is to be a number above 0"),
    ):
        with pytest.raises(Refusal, match=words):
            data_of(folder, shares)
    with pytest.raises(Refusal, match="lack a member"):
        data_of(folder, {"txt": 1, "none.txt": 1}).prepare_data()
    with pytest.raises(Refusal, match="data=stream draws no captions by position"):
        Streamed(folder, fields={"caption": SHARES})
