-- Every line of the service and of NGINX, once, under the names of today's schema.
--
-- The fields are taken out of JSON, not out of columns: a column exists in Cloud Logging's export
-- only when some line had it, and a view that names one that does not exist fails. Numbers are
-- FLOAT64 there. Cloud Logging delivers a line at least once, and so does the sidecar: lines that
-- are equal, time and all, are one. Two requests with one id, which a client can make, stay two.
CREATE OR REPLACE VIEW t5_requests.events AS
WITH lines AS (
  SELECT timestamp AS time, TO_JSON(jsonPayload) AS line
  FROM t5_requests.stdout
),
fields AS (
  SELECT
    time,
    TO_JSON_STRING(line) AS line,
    JSON_VALUE(line, '$.message') AS message,
    COALESCE(JSON_VALUE(line, '$.source'), IF(JSON_VALUE(line, '$.message') = 'access', 'nginx', 'service')) AS source,
    COALESCE(SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.schema_version') AS FLOAT64) AS INT64), 0) AS schema_version,
    JSON_VALUE(line, '$.request_id') AS request_id,
    JSON_VALUE(line, '$.trace_id') AS trace_id,
    NULLIF(JSON_VALUE(line, '$.client'), '') AS client,
    JSON_VALUE(line, '$.remote_addr') AS address,
    JSON_VALUE(line, '$.method') AS method,
    -- NGINX has the path that was asked for, which may be anything; `requests` sorts that out.
    COALESCE(JSON_VALUE(line, '$.route'), JSON_VALUE(line, '$.path')) AS route,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.status') AS FLOAT64) AS INT64) AS status,
    -- Version 0: `problem`.
    COALESCE(JSON_VALUE(line, '$.error_type'), JSON_VALUE(line, '$.problem')) AS error_type,
    JSON_VALUE(line, '$.model') AS model,
    JSON_VALUE(line, '$.model_revision') AS model_revision,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.num_beams') AS FLOAT64) AS INT64) AS num_beams,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.max_new_tokens') AS FLOAT64) AS INT64) AS max_new_tokens,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.length_words') AS FLOAT64) AS INT64) AS length_words,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.length_sentences') AS FLOAT64) AS INT64) AS length_sentences,
    SAFE_CAST(JSON_VALUE(line, '$.stream') AS BOOL) AS stream,
    JSON_VALUE(line, '$.on_overflow') AS on_overflow,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.texts') AS FLOAT64) AS INT64) AS texts,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.characters') AS FLOAT64) AS INT64) AS characters,
    -- Since version 2; before, calls that ended in an error had no tokens or times of the engine.
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.asked_tokens') AS FLOAT64) AS INT64) AS asked_tokens,
    SAFE_CAST(JSON_VALUE(line, '$.estimated') AS BOOL) AS estimated,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.input_tokens') AS FLOAT64) AS INT64) AS input_tokens,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.output_tokens') AS FLOAT64) AS INT64) AS output_tokens,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.chunks') AS FLOAT64) AS INT64) AS chunks,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.truncated') AS FLOAT64) AS INT64) AS truncated,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.cached') AS FLOAT64) AS INT64) AS cached,
    SAFE_CAST(JSON_VALUE(line, '$.queue_ms') AS FLOAT64) AS queue_ms,
    SAFE_CAST(JSON_VALUE(line, '$.compute_ms') AS FLOAT64) AS compute_ms,
    -- Version 0: `duration_ms`. NGINX: seconds.
    COALESCE(
      SAFE_CAST(JSON_VALUE(line, '$.total_ms') AS FLOAT64),
      SAFE_CAST(JSON_VALUE(line, '$.duration_ms') AS FLOAT64),
      SAFE_CAST(JSON_VALUE(line, '$.duration_s') AS FLOAT64) * 1000
    ) AS total_ms,
    JSON_VALUE(line, '$.replica') AS replica,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.request_bytes') AS FLOAT64) AS INT64) AS request_bytes,
    SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.response_bytes') AS FLOAT64) AS INT64) AS response_bytes,
    COALESCE(SAFE_CAST(SAFE_CAST(JSON_VALUE(line, '$.dropped_events') AS FLOAT64) AS INT64), 0) AS dropped_events
  FROM lines
)
SELECT * EXCEPT (line, message)
FROM fields
WHERE message IN ('request', 'access') AND request_id IS NOT NULL
QUALIFY ROW_NUMBER() OVER (PARTITION BY request_id, time, line ORDER BY source) = 1;
