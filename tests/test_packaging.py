"""`pip install .` installs the packages, the recipes and the card template, usable from any folder."""

import shutil

import pytest
from conftest import REPOSITORY, run_script

CONTENT = ("configuration_mmcot", "modeling_mmcot", "mmcot", "configs")
CONTENT += ("setup.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md")


@pytest.mark.slow
def test_installed_package_works_from_any_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in CONTENT:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_script("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", site, source)
    use = (
        "import mmcot.hub.export, sys; from importlib import resources; from mmcot.recipes.recipe import parse_recipe; "
        "assert mmcot.__file__.startswith(sys.argv[1]); "
        "assert resources.files('mmcot.hub').joinpath('card_template.md').is_file(); "
        "assert all(resources.files(name).joinpath('py.typed').is_file() for name in ('mmcot', 'modeling_mmcot')); "
        "print(parse_recipe(['--config', 'configs/demo/two_stages.yaml']).arguments.dataset)"
    )
    result = run_script("-c", use, site, cwd=elsewhere, PYTHONPATH=str(site))
    assert result.stdout.strip() == "demo"
    assert not (site / "train.py").exists()
    assert "mmcot COMMAND" in run_script(site / "bin" / "mmcot", "--help", cwd=elsewhere, PYTHONPATH=str(site)).stdout
