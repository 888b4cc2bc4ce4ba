"""Fine-tune an encoder on a folder of tasks, with several seeds: one table, one average."""

from pathlib import Path

from pretrain.cli import join_quoted, parse
from pretrain.config import SuiteOptions
from pretrain.errors import check, option_named
from pretrain.preflight import output_problems, problems_of


def main(argv: list[str]) -> None:
    """Parse, check every task, fine-tune where there is no result yet, print the table."""
    options = parse(join_quoted(argv, SuiteOptions), SuiteOptions, __doc__)
    check(problems_of(options) + output_problems(options, may_exist=True))

    from pretrain.adapt.suite import check_folder, read_tasks, run_suite, write_report
    from pretrain.files import lock

    output = Path(options.output)
    with option_named("--output"):
        lock(output)
        check_folder(output)
    facts = run_suite(options, read_tasks(options))
    print(f"\n{write_report(output, facts)}\n\nreport: {output / 'report.md'}")
