"""What `ldm` completes, and that bash takes it as it is."""

import shutil
import subprocess
import sys

import pytest

from ldm.command.completion import SCRIPT, completed, main


def test_commands_groups_choices_and_settings_are_completed():
    assert completed("ldm tr") == ["train "] and "quickstart " in completed("ldm ")
    assert completed("ldm list sampler/") == ["sampler/grid"]
    assert completed("ldm train experiment=emoji/sem") == ["experiment=emoji/semantic"]
    assert {"sampler=heun", "sampler=ddim"} <= set(completed("ldm sample model=x sampler="))
    assert completed("ldm sample sampler=heun sampler.s") == ["sampler.std=", "sampler.steps="]
    assert "sampler=" in completed("ldm train samp") and completed("ldm cache cl") == ["clear"]
    assert completed("ldm draw mod") == ["model="]
    assert completed("ldm sample nothing=x mo") == [] == completed("ldm pack PICTURES ")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("breaks", ["$' \\t\\n=:'", "$' \\t\\n'"])
def test_bash_takes_it(breaks, tmp_path):
    """`sampler=he` becomes `sampler=heun`, whether bash breaks words at `=` or not."""
    (tmp_path / "ldm").write_text(
        f'#!{sys.executable}\nimport sys\nprint("sampler=heun\\nsampler=hello" if sys.argv[1:] == ["completion", "query", '
        '"ldm sample model=x sampler=he"] else sys.argv)\n'
    )
    (tmp_path / "ldm").chmod(0o755)
    script = f"""
    PATH={tmp_path}:$PATH
    COMP_WORDBREAKS={breaks}
    {SCRIPT}
    COMP_LINE='ldm sample model=x sampler=he rest'
    COMP_POINT=29
    _ldm
    printf '%s\\n' "${{COMPREPLY[@]}}"
    complete -p ldm
    """
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
    start = "" if "=" in breaks else "sampler="
    assert told[:2] == [f"{start}heun", f"{start}hello"] and "-F _ldm ldm" in told[2]


def test_the_script_is_printed(capsys):
    main(["bash"])
    assert capsys.readouterr().out.strip() == SCRIPT.strip()
