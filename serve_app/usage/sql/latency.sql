-- How long do clients wait? Of calls that succeeded, per day and route, in milliseconds.
CREATE OR REPLACE VIEW t5_requests.latency AS
WITH calls AS (
  SELECT
    DATE(time) AS day,
    route,
    PERCENTILE_CONT(total_ms, 0.5) OVER (PARTITION BY DATE(time), route) AS p50,
    PERCENTILE_CONT(total_ms, 0.95) OVER (PARTITION BY DATE(time), route) AS p95,
    PERCENTILE_CONT(total_ms, 0.99) OVER (PARTITION BY DATE(time), route) AS p99,
    PERCENTILE_CONT(queue_ms, 0.95) OVER (PARTITION BY DATE(time), route) AS queue_p95,
    PERCENTILE_CONT(compute_ms, 0.95) OVER (PARTITION BY DATE(time), route) AS compute_p95
  FROM t5_requests.requests
  WHERE is_call AND succeeded
)
SELECT
  day,
  route,
  COUNT(*) AS calls,
  ROUND(MIN(p50), 2) AS p50_ms,
  ROUND(MIN(p95), 2) AS p95_ms,
  ROUND(MIN(p99), 2) AS p99_ms,
  ROUND(MIN(queue_p95), 2) AS queue_p95_ms,
  ROUND(MIN(compute_p95), 2) AS compute_p95_ms
FROM calls
GROUP BY 1, 2
ORDER BY day, route;
