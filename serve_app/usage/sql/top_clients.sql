-- Who calls most?
CREATE OR REPLACE VIEW t5_requests.top_clients AS
SELECT
  COALESCE(client, '-') AS client,
  COUNT(*) AS calls,
  ROUND(COUNT(*) / SUM(COUNT(*)) OVER (), 4) AS share,
  COUNT(DISTINCT DATE(time)) AS active_days,
  ROUND(COUNTIF(succeeded) / COUNT(*), 4) AS success_rate,
  MIN(time) AS first_call,
  MAX(time) AS last_call
FROM t5_requests.requests
WHERE is_call
GROUP BY 1
ORDER BY calls DESC, client;
