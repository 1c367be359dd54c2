"""Define the database tables of studies, trials, results and workers.

`Trial` and `WorkerRecord` document the columns. The column `hints` holds `Trial.sampler_attrs`.
"""

from __future__ import annotations

import sqlalchemy as sql
from sqlalchemy import Column, Float, Index, Integer, String, Table, Text

_NAME_LENGTH = 200
METADATA = sql.MetaData()
STUDIES = Table(
    "edgeopt_studies",
    METADATA,
    Column("study", String(_NAME_LENGTH), primary_key=True),
    Column("revision", Integer, nullable=False),
    Column("definition", Text, nullable=False),
    Column("sweep", Text, nullable=False),
    Column("opened_s", Float, nullable=False),
)
TRIALS = Table(
    "edgeopt_trials",
    METADATA,
    Column("study", String(_NAME_LENGTH), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", String(_NAME_LENGTH), nullable=False),
    Column("built", Integer, nullable=False),
    Column("recorded", Integer, nullable=False),
    Column("run_id", String(64), nullable=False),
    Column("ended_s", Float),
    Column("params", Text, nullable=False),
    Column("hints", Text, nullable=False),
    Column("summary", Text),
    Index("edgeopt_trials_once", "study", "digest", unique=True),
    Index("edgeopt_trials_news", "study", "revision"),
)
RESULTS = Table(
    "edgeopt_results",
    METADATA,
    Column("study", String(_NAME_LENGTH), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("result", Text, nullable=False),
)
WORKERS = Table(
    "edgeopt_workers",
    METADATA,
    Column("worker", String(_NAME_LENGTH), primary_key=True),
    Column("study", String(_NAME_LENGTH), nullable=False, index=True),
    Column("host", String(_NAME_LENGTH), nullable=False),
    Column("process", String(_NAME_LENGTH), nullable=False),
    Column("role", String(16), nullable=False),
    Column("code", String(128), nullable=False),
    Column("beat", Integer, nullable=False),
    Column("alive", Integer, nullable=False),
)
