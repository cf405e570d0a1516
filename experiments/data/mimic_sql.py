"""MIMIC's cohort, events and features as SQL. Every stay and every row of events gets a fate, so that none is lost.

Names in braces are filled in by `mimic`, doubled braces are a dictionary of SQL.
"""

INPUT_HOURS, GAP_HOURS, LEAST_HOURS = 24, 6, 36
LONG_STAY_HOURS = 72

# The hospital's record of death decides. Only where it has none does `dod` count, which is a date: a patient is dead
# for certain when that day ends. MIMIC-III shifts ages over 89 to 300, hence the cap. A stay over 36 hours outlasts the
# gap; a death recorded before the gap ends contradicts it, and excludes the stay. Where a stay has no beginning, which
# of the patient's stays was the first is unknown.
STAYS = f"""
CREATE TEMP TABLE stays AS
WITH ordered AS (
    SELECT *, row_number() OVER (PARTITION BY subject_id ORDER BY intime, {{stay}}) AS place,
        bool_or(intime IS NULL) OVER (PARTITION BY subject_id) AS unordered
    FROM icustays
), joined AS (
    SELECT subject_id, {{stay}} AS stay_id, intime, outtime, place, unordered,
        coalesce(first_careunit, '') AS unit, coalesce({{era}}, '') AS era,
        least({{age}}, 90) AS age, gender AS female,
        coalesce(
            least(deathtime, CASE WHEN hospital_expire_flag = 1 THEN dischtime END),
            date_trunc('day', dod) + INTERVAL 1 DAY
        ) AS death
    FROM ordered LEFT JOIN patients USING (subject_id) LEFT JOIN admissions USING (hadm_id)
)
SELECT *, CASE
    WHEN subject_id IS NULL OR stay_id IS NULL THEN 'no identifier'
    WHEN unordered THEN 'a stay of the patient has no beginning'
    WHEN place > 1 THEN 'not the first stay'
    WHEN age IS NULL THEN 'age unknown'
    WHEN NOT age > 15 THEN 'age of 15 years or less'
    WHEN outtime IS NULL THEN 'no end'
    WHEN NOT outtime > intime + INTERVAL {LEAST_HOURS} HOUR THEN '{LEAST_HOURS} hours or less'
    WHEN {{too_long}} THEN 'too long'
    WHEN death <= intime + INTERVAL {INPUT_HOURS + GAP_HOURS} HOUR THEN 'death before the gap ends'
    ELSE 'used' END AS fate
FROM joined
"""

COHORT = f"""
CREATE TEMP TABLE cohort AS
SELECT subject_id, stay_id, intime, outtime, unit, era, age, female,
    coalesce(death <= outtime, false)::INTEGER AS mortality,
    (outtime > intime + INTERVAL {LONG_STAY_HOURS} HOUR)::INTEGER AS long_stay
FROM stays WHERE fate = 'used'
"""

# One pass over a file, in which the rows that are not used fall into few groups: by their fate and by which of their
# cells did not parse.
EVENTS = f"""
INSERT INTO events
WITH converted AS (
    SELECT subject_id, variable, time, valid, states, intime, low, high, {{converted}} AS value
    FROM ({{source}}) LEFT JOIN items USING (itemid) LEFT JOIN cohort USING (subject_id)
), judged AS (
    SELECT *, CASE
        WHEN intime IS NULL THEN 'patient not in the cohort'
        WHEN variable IS NULL THEN 'not an item of ours'
        WHEN NOT valid THEN 'marked as an error'
        WHEN time IS NULL THEN 'no time'
        WHEN time < intime OR time >= intime + INTERVAL {INPUT_HOURS} HOUR THEN 'not in the first {INPUT_HOURS} hours'
        WHEN value IS NULL THEN 'no value'
        WHEN value NOT BETWEEN low AND high THEN 'implausible value'
        ELSE 'used' END AS fate
    FROM converted
)
SELECT {{name}} AS name, fate, states,
    CASE WHEN fate = 'used' THEN subject_id END AS subject_id,
    CASE WHEN fate = 'used' THEN variable END AS variable,
    CASE WHEN fate = 'used' THEN time END AS time,
    sum(CASE WHEN fate = 'used' THEN value END) AS total, count(*) AS number
FROM judged GROUP BY ALL
"""
EVENT_COLUMNS = (
    "name VARCHAR, fate VARCHAR, states BIGINT, subject_id BIGINT, variable VARCHAR, time TIMESTAMP, total DOUBLE, "
    "number BIGINT"
)

# Entries of one moment (two cuffs, pounds beside kilograms) count once, at their mean, which also makes "last" unique.
FEATURE_TABLE = """
WITH moments AS (
    SELECT subject_id, variable, time, sum(total) / sum(number) AS value
    FROM events WHERE fate = 'used' GROUP BY ALL
), summaries AS (
    SELECT subject_id, variable, {{
        "last": arg_max(value, time), "mean": avg(value), "min": min(value), "max": max(value), "count": count(*)
    }} AS summary
    FROM moments GROUP BY ALL
), wide AS (
    SELECT subject_id, {pivot} FROM summaries GROUP BY subject_id
)
SELECT subject_id, stay_id, unit, era, mortality, long_stay, {columns}
FROM cohort LEFT JOIN wide USING (subject_id) ORDER BY subject_id
"""
