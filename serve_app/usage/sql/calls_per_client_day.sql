-- How many calls does each client make a day?
CREATE OR REPLACE VIEW t5_requests.calls_per_client_day AS
SELECT
  DATE(time) AS day,
  COALESCE(client, '-') AS client,
  COUNT(*) AS calls,
  COUNTIF(succeeded) AS succeeded,
  COUNTIF(NOT succeeded) AS failed,
  SUM(COALESCE(texts, 1)) AS texts
FROM t5_requests.requests
WHERE is_call
GROUP BY 1, 2
ORDER BY day, calls DESC, client;
