"""A model store is fed by one registry; named environments are never mixed, and hand champions on by hash."""

import contextlib
import json
import shutil
import socket
from pathlib import Path

import pytest

from pipelines import steps
from pipelines.flows.promote import promote
from pipelines.promotion import move, reference
from pipelines.promotion.move import run_promotion, run_rollback
from pipelines.promotion.register import repair_all
from pipelines.promotion.score import score
from pipelines.registry import decisions, lineage, store
from pipelines.registry import versions as registry
from pipelines.settings import Settings, environment, environments
from tests.pipelines.toys import INK, PARAMS, Toy

NAME = "pixelcnn-mnist5k"


@pytest.fixture
def clone(tmp_path, new_database, monkeypatch):
    """Make a folder with a registry of its own, new or a copy, and work in it."""
    for variable in ("MLFLOW_TRACKING_URI", "BENTOML_HOME", "PIXELCNN_SERVICE_URL", "PIXELCNN_ENVIRONMENT"):
        monkeypatch.delenv(variable, raising=False)

    def make(name: str, database: Path = new_database) -> Toy:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(database, folder / "mlflow.db")
        shutil.copy(Path(steps.__file__).parents[1] / "params.yaml", folder)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which MLflow sets
        return Toy("mnist5k", folder)

    return make


def state_of(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_twenty_experiments_and_clones_leave_production_as_it_is(clone, monkeypatch):
    production = clone("production")
    production.register(0.3)
    production.promote()
    production.register(0.2)
    production.promote()
    home = production.folder / ".bentoml"
    assert store.home() == home, "a clone's own, without any setting"
    before, original = state_of(home), production.folder / "mlflow.db"
    expected = {
        "clone": "fed by another registry",
        "copy": "of which this registry is a copy",
        "copy that does not see the original": "of which this registry is a copy",
        "copy at the same path of another machine": "of which this registry is a copy",
        "experiment": "this is a DVC experiment",
        "own store": None,
    }
    for number in range(20):
        kind, refusal = list(expected.items())[number % len(expected)]
        with monkeypatch.context() as patch:
            patch.setenv("BENTOML_HOME", str(home))
            if kind in ("experiment", "copy at the same path of another machine"):
                patch.chdir(production.folder)
                patch.setenv("MLFLOW_TRACKING_URI", "")
                if kind == "experiment":  # what `dvc exp run` tells its stages, here of production's own registry
                    patch.setenv("DVC_EXP_BASELINE_REV", "c0ffee")
                else:
                    patch.setattr(socket, "gethostname", lambda: "elsewhere")
                other = production
            else:
                other = clone(str(number), *([original] if kind.startswith("copy") else []))
            if kind == "copy that does not see the original":
                patch.setattr(Path, "exists", lambda path, seen=Path.exists: path != original and seen(path))
            if number < 8:
                other.register(INK)  # whoever tries registers, and may compare
            if refusal is None:
                patch.delenv("BENTOML_HOME")
                assert other.promote()["decision"] == "promoted" if number < 8 else not repair_all()
            else:
                tries = [other.promote] if number < 8 else [lambda: run_rollback("mnist5k"), repair_all]
                for attempt in tries:
                    with pytest.raises(LookupError, match=rf"{refusal}.* nothing moved\."):
                        attempt()
        assert state_of(home) == before, (kind, number)
    monkeypatch.chdir(production.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert production.promote()["decision"] == "promoted", "what the experiment registered, once somebody asks for it"


def test_a_registry_that_is_moved_or_begun_anew_keeps_its_store(clone, monkeypatch, capsys):
    toy = clone("first")
    toy.register(INK)
    toy.promote()
    served = store.metadata_of(str(store.latest(NAME)))
    moved = toy.folder.rename(toy.folder.with_name("moved"))
    monkeypatch.setenv("BENTOML_HOME", str(moved / ".bentoml"))
    monkeypatch.chdir(moved)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert store.feeder()["at"].endswith("first/mlflow.db")
    assert repair_all() == []
    assert store.feeder()["at"] == str(moved / "mlflow.db")

    # Another one takes over by being told to, and goes on with what is served.
    other = clone("other")
    assert steps.main(["repair"]) == 1
    assert (
        "this one take over what is served: python -m pipelines.steps repair --take-over.\n" in capsys.readouterr().err
    )
    assert steps.main(["repair", "--take-over", "--why", "a lost disk"]) == 0
    assert decisions.history("mnist5k")[-1].endswith(": a lost disk")
    assert store.feeder()["at"] == str(other.folder / "mlflow.db")
    assert "it is version 1 and champion now (checksum checked, scored afresh on up to 200" in capsys.readouterr().out
    now = other.served()
    assert now["weights_sha256"] == served["weights_sha256"]
    assert now["run_id"] != served["run_id"], "its lineage leads to the registry that there is"
    answer = Path("answer.json")
    answer.write_text(json.dumps({"model": {key: now[key] for key in registry.versions("mnist5k")[0].lineage()}}))
    assert lineage.main(["--version", str(answer), "--verify"]) == 0
    assert steps.main(["repair"]) == 0
    assert capsys.readouterr().out.endswith("nothing to repair: registry and model store agree.\n")


@pytest.mark.parametrize(
    ("uri", "changed", "refusal"),
    [
        ("http://mlflow:5000", {"host": "other"}, None),  # a server has one address for all machines
        ("postgresql://u:p@10.0.0.7/mlflow", {"host": "other"}, None),
        ("http://mlflow:5000", {"at": "elsewhere:5000"}, "of which this registry is a copy"),
        ("http://127.0.0.1:5000", {"host": "other"}, "of which this registry is a copy"),  # but not this one
        ("postgresql:///mlflow", {"host": "other"}, "of which this registry is a copy"),
        ("http://mlflow:5000/", {"at": "mlflow:5000"}, None),
        ("postgresql://u:p/w@10.0.0.7/mlflow", {"at": "10.0.0.7/mlflow"}, None),
        ("postgresql://u:p/w@localhost/mlflow", {"host": "other"}, "of which this registry is a copy"),
        ("http://localhost:5000/", {"at": "127.0.0.1:5000"}, None),
        ("http://localhost.example:5000", {"at": "127.0.0.1.example:5000"}, "of which this registry is a copy"),
        ("http://mlflow:5000", {"registry": "new"}, None),  # lost, and begun anew
        ("http://mlflow:5000", {"registry": "new", "host": "other"}, "fed by another registry"),
    ],
)
def test_a_server_is_the_same_registry_at_the_same_address(tmp_path, monkeypatch, uri, changed, refusal):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(decisions, "registry_id", lambda: "known")
    store.set_feeder({"registry": "known", "at": move.location(), "host": socket.gethostname(), **changed})
    with pytest.raises(LookupError, match=refusal) if refusal else contextlib.nullcontext():
        move.check_feeder()


def test_a_store_that_another_registry_feeds_meanwhile_stays_its_own(clone, monkeypatch, tmp_path):
    """A decision takes minutes; before it the store was anybody's."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "store"))
    one = clone("one")
    one.register(INK)

    def scorer(*arguments):
        other = clone("other")
        other.name = "others"
        other.register(INK)
        assert other.promote()["decision"] == "promoted"
        monkeypatch.chdir(one.folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        return score(*arguments)

    with pytest.raises(LookupError, match=r"is fed by another registry, .*/other/mlflow\.db on .*: nothing moved\."):
        run_promotion(one.name, one.data, PARAMS, scorer)
    assert store.feeder()["at"] == str(tmp_path / "other/mlflow.db")
    assert (one.aliases, store.latest(NAME)) == ({}, None)


@pytest.mark.parametrize("damage", ["null", "5", "[]", "{}", '{"registry": "known"}', "{", "\xff"])
def test_a_feeder_that_is_damaged_is_none(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path))
    (tmp_path / "pixelcnn-registry.json").write_bytes(damage.encode("latin-1"))
    assert store.feeder() is None
    told = {"registry": "known", "at": "a", "host": "b"}
    store.set_feeder(told)
    assert store.feeder() == told


@pytest.fixture
def two_environments(clone, tmp_path, monkeypatch):
    """Staging and production of one file; work in staging."""
    for name in ("production", "staging"):
        toy = clone(name)
    text = "".join(
        f"{name}: {{registry: 'sqlite:///{tmp_path}/{name}/mlflow.db', store: '{tmp_path}/{name}/store',"
        f" service: 'http://{name}:3000'}}\n"
        for name in ("staging", "production")
    )
    Path("environments.yaml").write_text(text)
    monkeypatch.setenv("PIXELCNN_ENVIRONMENT", "staging")
    return toy


@pytest.mark.slow
def test_production_gets_what_staging_served_by_hash(two_environments, without_prefect, monkeypatch, capsys):
    toy = two_environments
    assert steps.main(["promote", "mnist5k", "--to", "production"]) == 1
    assert capsys.readouterr().err.startswith("promote: staging serves no model of mnist5k")
    toy.register(0.3)
    toy.promote()
    assert steps.main(["promote", "mnist5k", "--to", "production", "--why", "release 1"]) == 0
    toy.register(INK)
    toy.promote()
    staged = toy.served()
    monkeypatch.setattr(reference, "reference_of", lambda *_: pytest.fail("it is copied, as the data may not be here"))
    watched = (store.folder_of(str(store.latest(NAME))) / "beginnings.json").read_text()
    assert store.home().parts[-2:] == ("staging", "store")
    for said in ("are version 2 and champion of production now (checksum checked, scored", "already."):
        with monkeypatch.context() as patch:
            if said != "already.":  # the first time without a reference, as if staging had none yet
                patch.setattr(move, "write_reference", lambda *_: False)
            assert steps.main(["promote", "mnist5k", "--to", "production"]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert f"weights {staged['weights_sha256'][:12]}, served in staging as version 2" in out
    assert promote.fn("mnist5k", to="production")["text"].endswith(" already."), "and as Prefect's deployment"
    with environment("production"):
        (store.home() / "models" / NAME / "latest").unlink()
    assert promote.fn("mnist5k", to="production")["text"].endswith(
        f" already. Besides, the model store serves {NAME}:v2-{staged['weights_sha256'][:8]} again."
    )
    with pytest.raises(ValueError, match="it takes neither `version` nor `dry_run`"):
        promote.fn("mnist5k", dry_run=True, to="production")
    assert toy.served() == staged
    with environment("production") as settings:
        assert settings.service_url == "http://production:3000"
        assert toy.aliases == {"champion": "2", "previous": "1"}
        served = toy.served()
        assert served["weights_sha256"] == staged["weights_sha256"]
        assert served["run_id"] != staged["run_id"]
        known = store.folder_of(str(store.latest(NAME))) / "beginnings.json"
        assert known.read_text() == watched
        lines = decisions.history("mnist5k")
        assert ["release 1" in line for line in lines] == [True, False, False, False, False]
        assert "version 2 (gated_pixelcnn-mnist5k) replaced version 1" in lines[1]
        assert lineage.main(["--version", f"{NAME}/2", "--verify"]) == 0
        assert run_rollback("mnist5k")["new"] == "1"
    assert Settings().environment == "staging"
    assert steps.main(["promote", "mnist5k", "--to", "production", "--dry-run"]) == 1
    damaged = store.home() / "models" / str(store.latest(NAME)).replace(":", "/") / "model.safetensors"
    damaged.write_bytes(b"damaged")
    assert steps.main(["promote", "mnist5k", "--to", "production"]) == 1
    assert "is damaged. Restore a backup, or promote another version.\n" in capsys.readouterr().err


def test_a_name_of_no_environment_or_no_folder_is_told(
    two_environments, tmp_path, without_prefect, monkeypatch, capsys
):
    for name in ("staging", "prod"):
        assert steps.main(["promote", "mnist5k", "--to", name]) == 1
        said = f"{name!r} is no other environment than this one, staging. Known: development, production."
        assert capsys.readouterr().err == f"promote: {said}\n"
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/nowhere/mlflow.db")
    assert steps.main(["history", "mnist5k"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"history: the registry's folder {tmp_path}/nowhere does not exist: make it")
    assert not (tmp_path / "nowhere").exists()


def test_a_copy_is_of_what_is_served_and_of_no_version_that_is_named(two_environments, without_prefect, capsys):
    for words in (["--version", "3"], ["--dry-run"]):
        assert steps.main(["promote", "mnist5k", "--to", "production", *words]) == 1
        assert "it takes neither --version nor --dry-run." in capsys.readouterr().err
    for words in ({"version": 3}, {"dry_run": True}):
        with pytest.raises(ValueError, match="it takes neither `version` nor `dry_run`"):
            promote.fn("mnist5k", to="production", **words)


@pytest.mark.parametrize(
    ("text", "variables", "said"),
    [
        (None, {"PIXELCNN_ENVIRONMENT": "tests"}, r"'tests', which environments\.yaml .*Known: staging, production\."),
        (None, {"BENTOML_HOME": "/elsewhere"}, r"BENTOML_HOME is set, but not to the store of staging\. Unset it, or "),
        ("staging: {registry: s3cret}", {}, r"a store and, if there is one, a service: staging: store: Field required"),
        ("a: {registry: x, store: y}\nb: {registry: z, store: y}", {}, "a and b share a store. Give each its own"),
        ("a: {registry: s3cret, store: x}\nb: {registry: s3cret, store: y}", {}, "a and b share a registry"),
        ("a: {registry: '', store: s3cret}", {}, r"a service: a: registry: String should have at least 1 character$"),
        ("a: {registry: s3cret, store: '  '}", {}, r"a service: a: store: String should have at least 1 character$"),
        ("- s3cret", {}, "a service: Input should be a valid dictionary$"),
        ("a: [s3cret", {}, "it is no YAML$"),
        ("a: s\xe9cret", {}, "it is no YAML$"),
    ],
    ids=[
        "unknown",
        "mixed",
        "lacking",
        "shared store",
        "shared registry",
        "empty",
        "blank",
        "a list",
        "no YAML",
        "no UTF-8",
    ],
)
def test_environments_are_not_mixed(two_environments, monkeypatch, capsys, text, variables, said):
    if text is not None:
        Path("environments.yaml").write_text(text, encoding="latin-1")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(LookupError, match=said) as raised:
        Settings()
    assert "s3cret" not in str(raised.value), "passwords stand in that file"


def test_environments_that_cannot_be_read_are_told_of(two_environments):
    Path("environments.yaml").unlink()
    Path("environments.yaml").mkdir()
    with pytest.raises(LookupError, match=r"environments\.yaml cannot be read \(Is a directory\)\. Mend or remove it"):
        Settings()


@pytest.mark.parametrize(
    ("field", "one", "another"),
    [
        ("registry", "sqlite:////srv/mlflow.db", "sqlite:////srv/../srv/mlflow.db?timeout=60"),
        ("registry", "sqlite:///mlflow.db", "sqlite:///./mlflow.db"),
        ("registry", "postgresql://me:s3cret@Host/mlflow", "postgresql+psycopg://host/mlflow?sslmode=require"),
        ("registry", "postgresql:///mlflow?host=a", "postgresql:///mlflow?host=b"),  # two of one name
        ("registry", "postgresql://me:p#1@host/a", "postgresql://me:p#1@host/b"),
        ("store", "store/", "./other/../store"),
        ("store", "~/store", "$HOME/store"),
        ("service", "http://host:3000", "http://host:3000/"),
        ("service", "http://localhost:3000", "http://127.0.0.1:3000"),
    ],
)
def test_a_place_written_in_two_ways_is_shared(tmp_path, monkeypatch, field, one, another):
    monkeypatch.chdir(tmp_path)
    said = {"a": {"registry": "a", "store": "a", field: one}, "b": {"registry": "b", "store": "b", field: another}}
    Path("environments.yaml").write_text(json.dumps(said))
    is_shared = not another.endswith(("host=b", "host/b"))
    with pytest.raises(LookupError, match=f"a and b share a {field}") if is_shared else contextlib.nullcontext():
        environments()


@pytest.mark.parametrize(("field", "place"), [("service", "http://[s3cret"), ("store", "~unknown.user/s3cret")])
def test_a_place_that_cannot_be_read_shows_no_secret(tmp_path, monkeypatch, field, place):
    """Pydantic shows all variables, the token among them, of a ValueError."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIXELCNN_TOKEN", "s3cret")
    said = {name: {"registry": name, "store": name, "service": f"http://{name}"} for name in "ab"}
    said["a"][field] = place
    Path("environments.yaml").write_text(json.dumps(said))
    with pytest.raises(LookupError, match=f"the {field} of a or b cannot be read") as raised:
        Settings()
    assert "s3cret" not in str(raised.value)
