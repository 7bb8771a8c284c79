import json
import shutil
import sys
from pathlib import Path

import pytest

from megavit.cli.main import main
from tests.cluster.test_azureml import BASE as AZURE
from tests.cluster.test_kubernetes import APIS
from tests.cluster.test_kubernetes import BASE as KUBERNETES


def stub(name: str, folder: Path, monkeypatch, body: str) -> Path:
    """Write a client that records its arguments and then runs the given code."""
    calls = folder / "calls"
    noting = f"import json, sys; words = sys.argv[1:]; open({str(calls)!r}, 'a').write(json.dumps(words) + chr(10))"
    (folder / name).write_text(f"#!{sys.executable}\n{noting}\n{body}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.chdir(folder)
    return calls


def test_a_job_is_checked_by_the_server_and_then_created(tmp_path, monkeypatch, capsys):
    calls = stub("kubectl", tmp_path, monkeypatch, "")
    assert main(["submit", *KUBERNETES, "cluster.namespace=vision", "cluster.context=lab"]) == 0
    first, second = map(json.loads, calls.read_text().splitlines())
    where = ["--context=lab", "--namespace=vision", "--request-timeout=30s"]
    assert first == [*where, "create", "--dry-run=server", "--filename=-"]
    assert second == [*where, "create", f"--filename={tmp_path}/runs/digits/launch/job.yaml"]
    assert (
        "kubectl --context=lab --namespace=vision delete trainjob.trainer.kubeflow.org digits"
        in capsys.readouterr().out
    )


def test_a_job_that_the_server_refuses_leaves_nothing(tmp_path, monkeypatch, capsys):
    stub("kubectl", tmp_path, monkeypatch, 'sys.exit(\'error: no matches for kind "TrainJob" in version "v1alpha1"\')')
    assert main(["submit", *KUBERNETES]) == 2
    assert "(it is not installed in this cluster; try cluster.api=pytorchjob)" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_of_a_sweep_all_jobs_are_taken_or_none(tmp_path, monkeypatch, capsys):
    calls = stub("kubectl", tmp_path, monkeypatch, "if any('run-b' in word for word in words): sys.exit('full')")
    assert main(["submit", *KUBERNETES, "--multirun", "run.name=run-a,run-b"]) == 2
    assert json.loads(calls.read_text().splitlines()[-1])[1:] == [
        "delete",
        "trainjob.trainer.kubeflow.org",
        "run-a",
        "--wait=false",
    ]
    assert "job run-a was taken back" in capsys.readouterr().err


def test_without_kubectl_the_message_names_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *KUBERNETES]) == 2
    assert "cluster.dry_run=true" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("api", APIS)
def test_a_cluster_that_cannot_be_reached_is_one_message(api, tmp_path, monkeypatch, capsys):
    # No server listens on port 1.
    (tmp_path / "config").write_text(
        "{apiVersion: v1, kind: Config, current-context: x, contexts: [{name: x, context: {cluster: x, user: x}}], "
        "clusters: [{name: x, cluster: {server: 'http://127.0.0.1:1'}}], users: [{name: x, user: {}}]}"
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *KUBERNETES, f"cluster.api={api}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megavit: nothing was submitted: Kubernetes rejects the job:") and "refused" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_job_is_created_where_its_compute_is_found(tmp_path, monkeypatch, capsys):
    calls = stub("az", tmp_path, monkeypatch, "print(json.dumps({'name': 'calm_sun_1'}))")
    assert main(["submit", *AZURE, "cluster.workspace=vision", "cluster.resource_group=research"]) == 0
    first, second = map(json.loads, calls.read_text().splitlines())
    where = ["--workspace-name", "vision", "--resource-group", "research", "--output", "json", "--only-show-errors"]
    assert first == ["ml", "compute", "show", "--name", "a100", *where]
    assert second == ["ml", "job", "create", "--file", f"{tmp_path}/runs/digits/launch/job.yaml", *where]
    assert "az ml job stream --name calm_sun_1 --workspace-name vision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("ERROR: 'ml' is misspelled or not recognized by the system.", "az extension add --name ml"),
        ("ERROR: Please run 'az login' to setup account.", "az login"),
        ("ERROR: the following arguments are required: --workspace-name/-w", "set cluster.workspace"),
        ("ERROR: HTTPSConnectionPool: Max retries exceeded: Name or service not known", "not known"),
    ],
)
def test_where_azure_does_not_take_it_nothing_is_left(said, way_out, tmp_path, monkeypatch, capsys):
    stub("az", tmp_path, monkeypatch, f"sys.exit({said!r})")
    assert main(["submit", *AZURE]) == 2
    error = capsys.readouterr().err
    assert way_out in error and "nothing was submitted" in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_without_az_the_message_tells_the_way_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *AZURE]) == 2
    assert "cluster.dry_run=true" in capsys.readouterr().err


@pytest.mark.parametrize("base", [AZURE, KUBERNETES])
@pytest.mark.parametrize("setting", ["run.name=", "cluster.env.NAME="])
def test_a_secret_is_not_written_down_even_if_quoting_would_change_it(setting, base, monkeypatch, capsys):
    monkeypatch.setenv("SOME_TOKEN", "s3cret$(x)'y'")
    assert main(["submit", *base, "cluster.dry_run=true", f"{setting}\"as3cret$(x)'y'b\""]) == 2
    seen = capsys.readouterr()
    assert "$SOME_TOKEN" in seen.err and "s3cret" not in seen.err + seen.out
