"""What `make quickstart` does when it is called again."""

from ldm.command import quickstart


def test_a_quickstart_by_another_plan_is_kept_aside(tmp_path, monkeypatch):
    home = tmp_path / "quickstart"
    monkeypatch.setattr(quickstart, "HOME", home)
    plan = {"minutes": 8.0, "steps": {"clip": 150}, "recipes": [quickstart.recipe_name("emoji/clip")]}
    quickstart.set_aside(plan)
    (home / "clip.seconds").write_text("47")
    quickstart.set_aside(plan)
    assert (home / "clip.seconds").is_file(), "the same plan goes on"
    quickstart.set_aside(plan | {"recipes": ["emoji/clip-00000000"]})
    kept = list(tmp_path.glob("quickstart-8-minutes-*"))
    assert len(kept) == 1 and (kept[0] / "clip.seconds").is_file() and not (home / "clip.seconds").exists()
