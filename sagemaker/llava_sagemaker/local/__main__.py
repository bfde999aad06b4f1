"""`python -m llava_sagemaker.local`: a SageMaker endpoint on this machine."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from llava_sagemaker.local.bearer_token import local_token
from llava_sagemaker.local.instances import InstanceError, LocalInstance, start_all
from llava_sagemaker.local.runtime import make_app
from llava_triton.server.ports import check_ports
from llava_triton.server.triton_server import ServerError


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="llava_sagemaker.local", description=__doc__)
    parser.add_argument("--repository", type=Path, required=True, help="model repository to serve")
    parser.add_argument("--instances", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--port", type=int, default=8090, help="of the endpoint_url (%(default)s)")
    parser.add_argument("--endpoint", default="local", help="the endpoint's name (%(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("build/sagemaker-local"))
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    instances: list[LocalInstance] = []
    try:
        check_ports("127.0.0.1", {"http": options.port})
        options.logs.mkdir(parents=True, exist_ok=True)
        for index in range(1, options.instances + 1):
            log = options.logs / f"instance-{index}.log"
            log.write_bytes(b"")
            instances.append(LocalInstance(index, options.repository, log))
        start_all(instances)
        url = f"http://127.0.0.1:{options.port}"
        print(f"boto3:   client('sagemaker-runtime', endpoint_url='{url}')")
        print(f"         invoke_endpoint(EndpointName='{options.endpoint}', ...)")
        print(f"client:  Session.open('sagemaker://{options.endpoint}?endpoint_url={url}')")
        openai = f"{url}/endpoints/{options.endpoint}/openai/v1"
        print(f"OpenAI:  OpenAI(base_url='{openai}',\n                api_key='{local_token()}')")
        print("Ctrl-C stops it.", flush=True)
        config = uvicorn.Config(
            make_app(options.endpoint, instances),
            port=options.port,
            loop="uvloop",
            log_level="warning",
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run()
    except KeyboardInterrupt:
        pass
    except (InstanceError, ServerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if instances:
            print("stopping ...", flush=True)
        for instance in instances:
            instance.terminate()
        for instance in instances:
            instance.wait()
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
