"""The examples of docs/models.md are run as they stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support.checkpoints import TEXTS, save_checkpoint
from typer.testing import CliRunner

from veilhead_models.hf_import import import_hf
from veilhead_models.records import read_records
from veilhead_service.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^\$ veilhead-server (.*)$", PAGE.replace("\\\n", " "), re.MULTILINE)


def run(name, directory):
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLES[name]], capture_output=True, text=True, cwd=directory
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_python_example_is_run():
    assert PAGE.count("```python") == len(EXAMPLES) == 3


def test_the_record_that_is_shown_is_one(tmp_path):
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "notes.jsonl").write_text(shown)
    (record,) = read_records(tmp_path / "notes.jsonl")
    marked = [(record.text[one.start : one.end], one.label) for one in record.entities]
    assert marked == [("ada@example.com", "EMAIL"), ("555-0143", "PHONE")]


def test_the_import_example(tmp_path):
    save_checkpoint(tmp_path / "checkpoints" / "triage", "DistilBert")
    *report, one, two, three = run("import", tmp_path).splitlines()
    assert any("DistilBertForSequenceClassification" in line for line in report)
    for line in (one, two, three):
        *_, plain, encrypted, difference = line.split()
        assert plain == encrypted
        assert abs(float(difference)) <= 0.01


def test_the_convert_example(tmp_path):
    old = tmp_path / "checkpoints" / "old"
    model = save_checkpoint(old, "Bert")
    (old / "model.safetensors").unlink()
    torch.save(model.state_dict(), old / "pytorch_model.bin")
    run("convert", tmp_path)
    made = tmp_path / "checkpoints" / "triage"
    assert transformers.AutoTokenizer.from_pretrained(made)
    import_hf(made, tmp_path / "out", texts=TEXTS)


def test_the_tokens_example(tmp_path):
    save_checkpoint(
        tmp_path / "tagger", "Bert", task="TokenClassification", labels=("PER", "LOC", "DAY")
    )
    import_hf(tmp_path / "tagger", tmp_path / "artifacts" / "tagger", texts=TEXTS)
    entities = [ast.literal_eval(line) for line in run("tokens", tmp_path).splitlines()]
    assert entities
    assert set(entities[0]) == {"entity_group", "score", "word", "start", "end"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_with_its_options(command):
    subcommand, *rest = command.split()
    shown = CliRunner().invoke(app, [subcommand, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in (word for word in rest if word.startswith("--")):
        assert option in shown.stdout


def test_the_command_imports(tmp_path):
    save_checkpoint(tmp_path / "source", "Roberta")
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    out = tmp_path / "triage"
    arguments = ["import-hf", str(tmp_path / "source"), "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--texts", str(tmp_path / "texts.txt")])
    assert done.exit_code == 0, done.output
    assert f"{len(TEXTS)} given texts" in done.stdout
    assert f"triage: {out} (digest " in done.stdout
    (tmp_path / "texts.txt").write_bytes(b"\xff")
    done = CliRunner().invoke(app, [*arguments, "--texts", str(tmp_path / "texts.txt")])
    assert (done.exit_code, "is not UTF-8" in done.output) == (1, True)
    (tmp_path / "source" / "config.json").unlink()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("veilhead-server: ")
