"""The settings before jax starts."""

import jax

from train import backend


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        backend.setup(tmp_path / "kept")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        backend.setup(tmp_path / "other")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kept")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
