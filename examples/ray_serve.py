"""Serve a model with several replicas on a Ray cluster: Ray Serve LLM, with vLLM in each replica.

    python examples/ray_serve.py --model visualrwkv-7-0b1 --replicas 2

The address takes the requests of OpenAI's API, and Ray gives each to the replica that has least to do. vLLM finds this
package's plugin in each replica by itself.
"""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def llm_config(model: str, name: str, replicas: int, dtype: str, on_cpu: bool) -> LLMConfig:
    """Return what Ray Serve has to know of a model; each replica has its own engine."""
    bundle: dict[str, float] = {"CPU": 1} if on_cpu else {"CPU": 1, "GPU": 1}
    engine: dict[str, Any] = {"dtype": dtype, "enforce_eager": on_cpu, "max_model_len": 4096}
    return LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        deployment_config={"num_replicas": replicas},
        engine_kwargs=engine | {"chat_template_content_format": "openai"},
        placement_group_config={"bundles": [bundle]},
    )


def cpus_of(replicas: int) -> int:
    """Return how many CPUs Ray counts for so many replicas: one for each, for its engine, and for the ingress."""
    return 2 * replicas + 2


def running_replicas(app: str = "default") -> dict[str, int]:
    """Return how many replicas of each deployment take requests: of the engine, and of the ingress in front."""
    deployments = serve.status().applications[app].deployments
    return {name: found.replica_states.get("RUNNING", 0) for name, found in deployments.items()}


def main(
    model: Annotated[str, typer.Option(help="A model's folder or Hub id.")],
    name: Annotated[str | None, typer.Option(help="By which clients call it. Default: the folder's.")] = None,
    replicas: Annotated[int, typer.Option(help="Engines.")] = 2,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "auto",
    on_cpu: Annotated[bool, typer.Option("--cpu", help="Engines without a GPU.")] = False,
) -> None:
    """Serve until Ctrl-C."""
    name = name or Path(model).name
    if on_cpu and "RAY_ADDRESS" not in os.environ:  # a cluster of this machine alone
        ray.init(num_cpus=max(os.cpu_count() or 1, cpus_of(replicas)))
    app = build_openai_app({"llm_configs": [llm_config(model, name, replicas, dtype, on_cpu)]})
    serve.start(http_options={"host": host, "port": port})
    serve.run(app)
    for deployment, count in running_replicas().items():
        print(f"{deployment}: {count} running")
    print(f"Serving {name} at http://{host}:{port}/v1", flush=True)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    typer.run(main)
