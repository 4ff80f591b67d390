"""A loopback recorder of what the real W&B client sends: enough of its protocol for one online run with a table and a referenced artifact. It records; it is not a W&B server."""
import base64
import gzip
import json
import re
import threading
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "local-" + "0123456789" * 4


def gid(kind: str, name: str) -> str: return base64.b64encode(f"{kind}:{name}".encode()).decode()


@dataclass
class Recorded:
    "One run, as it arrived."
    name: str
    project: str
    group: str | None = None
    job_type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    system: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None


class WandbServer:
    "`with WandbServer() as server:` runs by id in `server.runs`, artifacts in `server.artifacts`, uploaded bytes by path in `server.uploads`, everything received in `server.received`."

    def __init__(self) -> None:
        self.runs: dict[str, Recorded] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.links: list[dict[str, Any]] = []
        self.held: dict[tuple[str, str], dict[str, str]] = {} # project and collection → alias → digest: each alias is at one version
        self.uploads: dict[str, bytes] = {}
        self.received: list[bytes] = []
        self.unknown: list[str] = []
        self.lock = threading.RLock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *args: Any) -> None: pass

            def _body(self) -> bytes:
                if self.headers.get("transfer-encoding", "").lower() == "chunked":
                    data = b""
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else: data = self.rfile.read(int(self.headers.get("content-length") or 0))
                kind = self.headers.get("content-encoding")
                return gzip.decompress(data) if kind == "gzip" else zlib.decompress(data) if kind == "deflate" else data

            def _answer(self) -> None:
                body = self._body()
                with server.lock: said = json.dumps(server.route(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = do_PUT = _answer

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            def handle_error(self, *args: Any) -> None: pass # a client that went away

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None: self.cut()

    def cut(self) -> None:
        "The network is gone."
        self.http.shutdown()
        self.http.server_close()

    def route(self, path: str, body: bytes) -> dict[str, Any]:
        self.received.append(body)
        if path == "/graphql":
            asked = json.loads(body)
            name = asked.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1] # type: ignore[index]
            answer = getattr(self, f"op_{name}", None)
            if answer is not None: return {"data": answer(asked.get("variables") or {})}
            self.unknown.append(name)
            return {"errors": [{"message": f"{name} is not recorded"}], "data": None}
        if found := re.fullmatch(r"/files/.*?([^/]+)/file_stream", path): self.stream(self.runs[found[1]], json.loads(body))
        elif path.startswith("/put/"): self.uploads[path.removeprefix("/put/")] = body
        return {}

    def stream(self, run: Recorded, sent: dict[str, Any]) -> None:
        for name, part in (sent.get("files") or {}).items():
            if name == "wandb-summary.json": run.summary = json.loads(part["content"][-1])
            elif name in ("wandb-history.jsonl", "wandb-events.jsonl"):
                (run.history if "history" in name else run.system)[part["offset"]:] = [json.loads(line) for line in part["content"]]
        if sent.get("complete"): run.exit_code = sent.get("exitcode")

    def op_Viewer(self, v: dict[str, Any]) -> Any:
        return {"viewer": {"id": "1", "entity": "local", "username": "local", "name": "local", "email": "", "admin": False, "flags": "{}", "deletedAt": None, "apiKeys": {"edges": []},
                           "teams": {"edges": [{"node": {"name": "local"}}]}}}

    def op_ServerFeaturesQuery(self, v: dict[str, Any]) -> Any: return {"serverInfo": {"features": []}}
    def op_OrganizationCoreWeaveOrganizationID(self, v: dict[str, Any]) -> Any: return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
    def op_RunStoppedStatus(self, v: dict[str, Any]) -> Any: return {"project": {"run": {"stopped": False}}}

    def op_UpsertBucket(self, v: dict[str, Any]) -> Any:
        by_id = {gid("Run", n): n for n in self.runs}
        name = by_id.get(v.get("id") or "") or v["name"]
        run = self.runs.setdefault(name, Recorded(name, v.get("project") or ""))
        if v.get("config"): run.config |= json.loads(v["config"])
        if v.get("summaryMetrics"): run.summary |= json.loads(v["summaryMetrics"])
        run.group, run.job_type = v.get("groupName") or run.group, v.get("jobType") or run.job_type
        project = {"id": gid("Project", run.project), "name": run.project, "entity": {"id": gid("Entity", "local"), "name": "local"}}
        bucket = {"id": gid("Run", name), "name": name, "displayName": name, "description": None, "config": "{}", "sweepName": None, "project": project, "historyLineCount": len(run.history)}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def op_CreateRunFiles(self, v: dict[str, Any]) -> Any:
        self.runs[v["run"]].files += v["files"]
        return {"createRunFiles": {"runID": gid("Run", v["run"]), "uploadHeaders": [], "files": [{"name": f, "uploadUrl": f"{self.url}/put/{v['run']}/{f}"} for f in v["files"]]}}

    def op_CreateArtifact(self, v: dict[str, Any]) -> Any:
        v = v.get("input") or v
        self.artifacts.append(v | {"state": "PENDING"})
        name = str((v.get("artifactCollectionNames") or [v.get("artifactCollectionName")])[0])
        self.held.setdefault(("mlray", name), {}).update({a["alias"]: v["digest"] for a in v.get("aliases") or ()})
        return {"createArtifact": {"artifact": {"id": str(len(self.artifacts) - 1), "digest": v["digest"], "state": "PENDING",
                                                "artifactSequence": {"id": gid("Sequence", name), "latestArtifact": None}}}}

    def op_CreateArtifactManifest(self, v: dict[str, Any]) -> Any:
        v = v.get("input") or v
        url = f"{self.url}/put/artifact/{v['artifactID']}/manifest" if v.get("includeUpload", True) else None
        return {"createArtifactManifest": {"artifactManifest": {"id": v["artifactID"], "file": {"id": "1", "name": "wandb_manifest.json", "displayName": "wandb_manifest.json", "uploadUrl": url, "uploadHeaders": []}}}}

    def op_CreateArtifactFiles(self, v: dict[str, Any]) -> Any:
        files = (v.get("input") or v).get("artifactFiles") or v["artifactFiles"]
        node = lambda f: {"id": f["name"], "name": f["name"], "displayName": f["name"], "uploadUrl": f"{self.url}/put/artifact/{f['artifactID']}/file/{f['name']}", "uploadHeaders": [],
                          "artifact": {"id": f["artifactID"]}, "storagePath": f["name"], "uploadMultipartUrls": None}
        return {"createArtifactFiles": {"files": {"edges": [{"node": node(f)} for f in files]}}}

    def op_ArtifactType(self, v: dict[str, Any]) -> Any: return {"project": {"artifact": None}} # none of that name yet

    def op_CommitArtifact(self, v: dict[str, Any]) -> Any:
        at = (v.get("input") or v)["artifactID"]
        self.artifacts[int(at)]["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": at, "digest": self.artifacts[int(at)]["digest"]}}}

    def op_GetDefaultEntity(self, v: dict[str, Any]) -> Any: return {"viewer": {"id": "1", "entity": "local"}}

    def op_Runs(self, v: dict[str, Any]) -> Any:
        node = lambda r: {"id": gid("Run", r.name), "tags": [], "name": r.name, "displayName": r.name, "sweepName": None, "state": "finished", "config": json.dumps(r.config), "group": r.group, "jobType": r.job_type, "commit": None, "readOnly": False,
                          "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00", "description": "", "notes": None, "systemMetrics": "{}", "summaryMetrics": json.dumps(r.summary), "historyLineCount": len(r.history), "user": {"name": "local", "username": "local"},
                          "historyKeys": None, "projectId": 1}
        asked = json.loads(v.get("filters") or "{}").get("jobType")
        found = [r for r in self.runs.values() if asked in (None, r.job_type)]
        return {"project": {"internalId": 1, "runCount": len(found), "readOnly": False, "runs": {"edges": [{"node": node(r), "cursor": r.name} for r in found], "pageInfo": {"endCursor": None, "hasNextPage": False}}}}

    def op_RunResumeStatus(self, v: dict[str, Any]) -> Any:
        run = self.runs.get(v["name"])
        known = {"id": gid("Run", v["name"]), "name": v["name"], "summaryMetrics": "{}", "displayName": v["name"], "logLineCount": 0, "historyLineCount": 0, "eventsLineCount": 0, "historyTail": "[]", "eventsTail": "[]",
                 "config": "{}", "tags": [], "notes": "", "wandbConfig": '{"t": 1}'}
        return {"model": {"id": gid("Project", v["project"]), "name": v["project"], "entity": {"id": gid("Entity", "local"), "name": "local"}, "bucket": known if run else None}}

    def op_ArtifactByID(self, v: dict[str, Any]) -> Any:
        made, project = self.artifacts[int(v["id"])], {"id": gid("Project", "mlray"), "internalId": "1", "name": "mlray", "entity": {"name": "local"}}
        of = {"__typename": "ArtifactSequence", "name": str((made.get("artifactCollectionNames") or [made.get("artifactCollectionName")])[0]), "project": project}
        aliases = self.aliases("mlray", of["name"], made["digest"], of)
        return {"artifact": {"__typename": "Artifact", "id": v["id"], "artifactSequence": of, "versionIndex": int(v["id"]), "artifactType": {"name": made["artifactTypeName"]}, "description": None, "metadata": made.get("metadata") or "{}",
                             "ttlDurationSeconds": 0, "ttlIsInherited": False, "tags": [], "historyStep": None, "state": made["state"], "size": 0, "digest": made["digest"], "digestAlgorithm": "MANIFEST_MD5", "commitHash": "0",
                             "fileCount": 1, "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": aliases}}

    def aliases(self, project: str, collection: str, digest: str, of: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"__typename": "ArtifactAlias", "id": a, "alias": a, "artifactCollection": of} for a, d in self.held.get((project, collection), {}).items() if d == digest]

    def op_FetchLinkedArtifacts(self, v: dict[str, Any]) -> Any:
        made, at = self.op_ArtifactByID({"id": v["artifactID"]})["artifact"], list[dict[str, Any]]()
        for (name, collection), held in self.held.items():
            if made["digest"] not in held.values(): continue
            project = {"id": gid("Project", name), "internalId": "2", "name": name, "entity": {"name": "local"}}
            of = {"__typename": "ArtifactSequence" if name == "mlray" else "ArtifactPortfolio", "name": collection, "project": project}
            at.append({"node": {"versionIndex": 0, "createdAt": "2026-01-01T00:00:00", "aliases": self.aliases(name, collection, made["digest"], of), "artifactCollection": of}})
        return {"artifact": {"artifactMemberships": {"edges": at}}}

    def op_DeleteAliases(self, v: dict[str, Any]) -> Any:
        for a in v["input"]["aliases"]: self.held[a["projectName"], a["artifactCollectionName"]].pop(a["alias"], None)
        return {"result": {"success": True}}

    def op_UpdateArtifact(self, v: dict[str, Any]) -> Any: return {"result": self.op_ArtifactByID({"id": v["input"]["artifactID"]})}
    def op_IsProjectReadOnly(self, v: dict[str, Any]) -> Any: return {"project": {"readOnly": False}}

    def op_FetchOrgInfoFromEntity(self, v: dict[str, Any]) -> Any:
        return {"entity": {"organization": {"name": "local", "orgEntity": {"name": "local-org"}}, "user": None}}

    def op_LinkArtifact(self, v: dict[str, Any]) -> Any:
        asked = v.get("input") or v
        self.links.append(asked)
        self.held.setdefault((asked["projectName"], asked["artifactPortfolioName"]), {}).update({a["alias"]: self.artifacts[int(asked["artifactID"])]["digest"] for a in asked["aliases"]})
        project = {"id": gid("Project", asked["projectName"]), "internalId": "2", "name": asked["projectName"], "entity": {"name": asked["entityName"]}}
        of = {"__typename": "ArtifactPortfolio", "name": asked["artifactPortfolioName"], "project": project}
        aliases = [{"__typename": "ArtifactAlias", "id": a["alias"], "alias": a["alias"], "artifactCollection": of} for a in asked["aliases"]]
        member = {"__typename": "ArtifactCollectionMembership", "id": str(len(self.links)), "versionIndex": 0, "createdAt": "2026-01-01T00:00:00", "aliases": aliases, "artifactCollection": of}
        return {"result": {"versionIndex": 0, "artifactMembership": member | self.op_ArtifactByID({"id": asked["artifactID"]})}}
