-- What does each client cost a day? Calls that failed count with what they had used by then. Seconds in the model are those its calls took, in batches they
-- shared with others: for shares of a bill, not to be added up to the time that GPUs ran.
CREATE OR REPLACE VIEW t5_requests.cost_per_client_day AS
WITH clients AS (
  SELECT
    DATE(time) AS day,
    COALESCE(client, '-') AS client,
    COUNT(*) AS calls,
    COALESCE(SUM(chunks), 0) AS chunks,
    COALESCE(SUM(input_tokens), 0) AS input_tokens,
    COALESCE(SUM(output_tokens), 0) AS output_tokens,
    COALESCE(SUM(compute_ms), 0) / 1000 AS compute_seconds,
    COALESCE(SUM(cached), 0) AS cached
  FROM t5_requests.requests
  WHERE is_call
  GROUP BY 1, 2
)
SELECT
  day,
  client,
  calls,
  chunks,
  input_tokens,
  output_tokens,
  cached,
  ROUND(compute_seconds, 3) AS compute_seconds,
  ROUND(SAFE_DIVIDE(compute_seconds, SUM(compute_seconds) OVER (PARTITION BY day)), 4) AS compute_share
FROM clients
ORDER BY day, compute_seconds DESC, client;
