-- Which rate does each client need? Its busiest minute, the minute that only one of twenty of its
-- active ones is above, both in calls and in tokens, and how much of it is refused now. The
-- greediest come first.
CREATE OR REPLACE VIEW t5_requests.rate_limit_candidates AS
WITH minutes AS (
  SELECT
    client,
    TIMESTAMP_TRUNC(time, MINUTE) AS minute,
    COUNT(*) AS calls,
    COUNTIF(throttled) AS throttled,
    SUM(COALESCE(input_tokens, 0) + COALESCE(output_tokens, 0)) AS tokens
  FROM t5_requests.requests
  WHERE is_call AND client IS NOT NULL
  GROUP BY 1, 2
),
ranked AS (
  SELECT
    *,
    PERCENTILE_CONT(calls, 0.95) OVER (PARTITION BY client) AS p95,
    PERCENTILE_CONT(tokens, 0.95) OVER (PARTITION BY client) AS p95_tokens,
    ROW_NUMBER() OVER (PARTITION BY client ORDER BY calls DESC, minute) AS busiest
  FROM minutes
)
SELECT
  client,
  SUM(calls) AS calls,
  COUNT(*) AS active_minutes,
  MAX(calls) AS peak_per_minute,
  MIN(IF(busiest = 1, minute, NULL)) AS peak_minute,
  ROUND(MIN(p95), 1) AS p95_per_minute,
  MAX(tokens) AS peak_tokens_per_minute,
  ROUND(MIN(p95_tokens), 1) AS p95_tokens_per_minute,
  SUM(throttled) AS throttled,
  ROUND(SUM(throttled) / SUM(calls), 4) AS throttled_share
FROM ranked
GROUP BY 1
ORDER BY peak_per_minute DESC, client;
