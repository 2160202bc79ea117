-- All of it in one row.
CREATE OR REPLACE VIEW t5_requests.overview AS
WITH calls AS (
  SELECT
    *,
    PERCENTILE_CONT(IF(succeeded, total_ms, NULL), 0.5) OVER () AS p50_ms,
    PERCENTILE_CONT(IF(succeeded, total_ms, NULL), 0.95) OVER () AS p95_ms,
    PERCENTILE_CONT(IF(succeeded, total_ms, NULL), 0.99) OVER () AS p99_ms
  FROM t5_requests.requests
  WHERE is_call
)
SELECT
  MIN(time) AS first_call,
  MAX(time) AS last_call,
  COUNT(*) AS calls,
  COUNT(DISTINCT client) AS clients,
  ROUND(SAFE_DIVIDE(COUNTIF(succeeded), COUNT(*)), 4) AS success_rate,
  ROUND(SAFE_DIVIDE(COUNTIF(server_error), COUNT(*)), 4) AS error_rate,
  COUNTIF(auth_failure) AS auth_failures,
  COUNTIF(throttled) AS throttled,
  ROUND(MIN(p50_ms), 2) AS p50_ms,
  ROUND(MIN(p95_ms), 2) AS p95_ms,
  ROUND(MIN(p99_ms), 2) AS p99_ms,
  COALESCE(SUM(input_tokens), 0) AS input_tokens,
  COALESCE(SUM(output_tokens), 0) AS output_tokens,
  ROUND(COALESCE(SUM(compute_ms), 0) / 1000, 3) AS compute_seconds,
  SUM(dropped_events) AS dropped_events
FROM calls
HAVING COUNT(*) > 0;
