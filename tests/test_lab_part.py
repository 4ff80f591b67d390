LOAD = '''
import json, sys, threading, time
from mlray.client import Client
url, key, row, seconds = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
done, failed, slowest, end = [], [], [0.0], time.monotonic() + seconds
def ask():
    with Client(url, key) as client:
        while time.monotonic() < end:
            began = time.monotonic()
            try: done.append(client.predict("patients", [row]).predictions[0]["score"])
            except Exception as error: failed.append(repr(error)[:200])
            slowest[0] = max(slowest[0], time.monotonic() - began)
threads = [threading.Thread(target=ask) for _ in range(8)]
print("begun", flush=True)
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps({"answered": len(done), "scores": len(set(done)), "failed": failed[:5], "failures": len(failed), "slowest_s": round(slowest[0], 2)}))
'''
