"""Great Expectations on frames of counts: run the expectations, build the data docs, give plain outcomes.

A frame is pandas' or Spark's; each is judged by Great Expectations' own engine for it.

Result format SUMMARY: COMPLETE would copy every bad value. Nothing is sent anywhere: analytics are off, and
the data docs load nothing from the network.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GX_ANALYTICS_ENABLED"] = "false"

import great_expectations as gx
from great_expectations.checkpoint import UpdateDataDocsAction
from great_expectations.data_context.types.base import (
    DataContextConfig,
    InMemoryStoreBackendDefaults,
    ProgressBarsConfig,
)

from validation.check import Outcome
from validation.data_docs import make_offline
from validation.suite import Limit, Rule

_SITE = "data_docs"


@dataclass(frozen=True, slots=True)
class Asset:
    """A frame of pandas or Spark, what it must be like as a whole, and what each of its rows must be like."""

    name: str
    frame: Any
    limits: Sequence[Limit]
    rules: Sequence[Rule] = ()


def judge(assets: Sequence[Asset], run_name: str, docs: Path) -> list[Outcome]:
    """The outcomes of every asset's limits, then of its rules; builds the data docs in `docs`."""
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    context = gx.get_context(mode="ephemeral", project_config=_configuration(docs))
    outcomes = []
    for asset in assets:
        batch = (
            _source(context, asset.frame)
            .add_dataframe_asset(asset.name)
            .add_batch_definition_whole_dataframe("all")
        )
        suite = context.suites.add(gx.ExpectationSuite(name=asset.name))
        for expectation in _expectations(asset):
            suite.add_expectation(expectation)
        definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=asset.name, data=batch, suite=suite)
        )
        checkpoint = gx.Checkpoint(
            name=asset.name,
            validation_definitions=[definition],
            result_format={"result_format": "SUMMARY", "partial_unexpected_count": 0},
            actions=[UpdateDataDocsAction(name=_SITE, site_names=[_SITE])],
        )
        run = context.checkpoints.add(checkpoint).run(
            batch_parameters={"dataframe": asset.frame}, run_id=gx.RunIdentifier(run_name=run_name)
        )
        (result,) = run.run_results.values()
        outcomes += _outcomes(asset, result.results)
    make_offline(docs)
    return outcomes


def _source(context: Any, frame: Any) -> Any:
    """The data source for a frame: one for pandas' and one for Spark's."""
    kind = "spark" if type(frame).__module__.startswith("pyspark.") else "pandas"
    sources = context.data_sources
    if kind in sources.all():
        return sources.get(kind)
    return sources.add_spark(kind, persist=False) if kind == "spark" else sources.add_pandas(kind)


def _configuration(docs: Path) -> DataContextConfig:
    """All in memory but one data docs site in `docs`."""
    site = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    return DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        data_docs_sites={_SITE: site},
        progress_bars=ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )


def _expectations(asset: Asset) -> list[Any]:
    """Limits as they are written; a rule is a column that holds nothing but 0."""
    made = [
        getattr(gx.expectations, limit.expectation)(
            **limit.options,
            severity="critical" if limit.blocks else "warning",
            notes=_notes(limit),
            meta={"name": limit.name},
        )
        for limit in asset.limits
    ]
    made += [
        gx.expectations.ExpectColumnValuesToBeInSet(
            column=rule.feature,
            value_set=[0],
            severity="warning",
            notes=_notes(rule),
            meta={"name": rule.rule},
        )
        for rule in asset.rules
    ]
    return made


def _notes(expected: Limit | Rule) -> list[str]:
    return [expected.says, f"Why: {expected.reason}"]


def _outcomes(asset: Asset, results: Sequence[Any]) -> list[Outcome]:
    """Results by the names of what was expected, in that order (Great Expectations has its own)."""
    found = {result.expectation_config.meta["name"]: result for result in results}
    expected = [(each.group, each.name, each.says, each.blocks) for each in asset.limits]
    expected += [(each.group, each.rule, each.says, False) for each in asset.rules]
    return [
        Outcome(group, name, says, blocking, bool(found[name].success), _observed(found[name]))
        for group, name, says, blocking in expected
    ]


def _observed(result: Any) -> Mapping[str, Any]:
    """The numbers of a result; of a schema, only what does not match; of an exception, its message."""
    # One exception, or one for each metric that was needed.
    raised = [result.exception_info, *result.exception_info.values()]
    messages = [
        each["exception_message"]
        for each in raised
        if isinstance(each, dict) and each.get("raised_exception")
    ]
    if messages:
        return {"error": str(messages[0])}
    found = result.result
    if "unexpected_count" in found:
        return {"rows": int(found["element_count"]), "broken_by": int(found["unexpected_count"])}
    mismatched = (found.get("details") or {}).get("mismatched")
    if mismatched is not None:
        return {"mismatched": [f"expected {each['Expected']}, found {each['Found']}" for each in mismatched]}
    value = found.get("observed_value")
    if isinstance(value, list):
        return {"columns": len(value)}
    return {"value": value.item() if hasattr(value, "item") else value}
