"""Removes copies, near copies and text of other languages with datatrove, before `mythos data prepare`.

    pip install 'datatrove[io,processing]' spacy && python examples/clean_text.py crawl/ clean/ --tasks 16 --workers 16
    mythos data prepare clean/documents --out data/clean --tokenizer smollm2

The folder has .jsonl files with a `text` (or .jsonl.gz; datatrove's ParquetReader reads .parquet). Of documents that
share most of their five-word sequences (a Jaccard similarity from about 0.72 on), one is kept. Every stage goes on
where it was stopped. The stages are datatrove's own, and run on Slurm or Ray with its other executors.
"""

import argparse
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.filters import LambdaFilter, LanguageFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--tasks", type=int, default=1, help="how many shares the files are divided into")
    parser.add_argument("--workers", type=int, default=1, help="how many shares are worked on at once")
    parser.add_argument("--min-characters", type=int, default=200, help="shorter documents are left out")
    parser.add_argument("--languages", nargs="*", default=[], help="such as en; needs fasttext's model, 126 MB, once")
    arguments = parser.parse_args()
    out, tasks, config = Path(arguments.out), arguments.tasks, MinhashConfig()

    def run(stage: str, steps: list, tasks: int) -> None:
        LocalPipelineExecutor(
            steps, tasks=tasks, workers=min(tasks, arguments.workers), logging_dir=str(out / "logs" / stage)
        ).run()

    filters = [LambdaFilter(lambda document: len(document.text) >= arguments.min_characters)]
    if arguments.languages:
        filters.append(LanguageFilter(languages=arguments.languages))
    run(
        "filter", [JsonlReader(arguments.source), *filters, JsonlWriter(str(out / "filtered"), compression=None)], tasks
    )
    reader = JsonlReader(str(out / "filtered"))
    run("signatures", [reader, MinhashDedupSignature(str(out / "signatures"), config=config)], tasks)
    buckets = MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config)
    run("buckets", [buckets], config.num_buckets)
    run("clusters", [MinhashDedupCluster(str(out / "buckets"), str(out / "clusters"), config=config)], 1)
    writer = JsonlWriter(str(out / "documents"), output_filename="${rank}.jsonl", compression=None)
    run("documents", [reader, MinhashDedupFilter(str(out / "clusters")), writer], tasks)


if __name__ == "__main__":
    main()
