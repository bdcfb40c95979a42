"""`trl-tract serve`: a judge behind HTTP. What was asked for is checked before weights are loaded."""

import sys
from pathlib import Path

from trl_tract.backends import make_backend
from trl_tract.commands.deploying import ServeArguments
from trl_tract.commands.options import EngineArguments, GenerationArguments, RuleArguments
from trl_tract.integrations.serving import KEY_VARIABLE, check_installed, is_loopback, make_server, open_socket
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.judge.scoring import check_without_rationales
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.sources.rubric import Rubric
from trl_tract.text.secrets import key_of


def serve(args: ServeArguments, rules: RuleArguments, generation: GenerationArguments, engine: EngineArguments) -> int:
    """Answer requests until SIGTERM or Ctrl-C."""
    check_installed()
    config = JudgeConfig.load(args.model)
    scales = config.scales
    if not config.writes_rationale:
        check_without_rationales(generation.num_generations)
    rubric = Rubric.load(args.rubric) if args.rubric else None
    if rubric is not None:
        rubric.check(scales[0].grid)
    with open_socket(args.host, args.port) as listening:
        if not is_loopback(args.host) and key_of(KEY_VARIABLE) is None:
            print(f"{KEY_VARIABLE} is not set: anyone who can reach {args.host} can send requests", file=sys.stderr)
        settings = {**generation.sampling(), "num_generations": generation.num_generations, **rules.rules()}
        backend = make_backend(args.model, **engine.options(generation))
        judge = CoTRAILJudge.from_pretrained(args.model, backend, **settings)
        if rubric is not None:
            judge.rubric = rubric
        name = args.name or Path(args.model).name
        server = make_server(judge, name, host=args.host, **args.limits())
        host, port = listening.getsockname()[:2]
        print(f"{name} answers at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listening])
    return 0
