"""Makes tests/launch/schemas/*.json: the schemas of the resources that the launchers write, as standard JSON schemas in
which an unknown field is an error.

    python -m tests.launch.prune_schemas CRD.yaml JOBSET_COMMIT DEFINITIONS.json KUBERNETES_VERSION

CRD.yaml: config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset.
DEFINITIONS.json: _definitions.json of the package kubernetes-validate, made from Kubernetes' OpenAPI document. Both are
under the Apache License 2.0. Descriptions are left out, and so are parts of a pod that no launcher uses (`UNUSED`); a
launcher that comes to use one needs it here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "schemas"
UNUSED = frozenset(
    {
        *("affinity", "initContainers", "ephemeralContainers", "topologySpreadConstraints", "volumeClaimPolicies"),
        *("managedFields", "ownerReferences", "windowsOptions", "seLinuxOptions", "hostAliases", "dnsConfig"),
        *("resourceClaims", "schedulingGates", "overhead", "readinessGates", "restartPolicyRules", "volumeDevices"),
        *("envFrom", "grpc", "tcpSocket", "postStart", "stopSignal", "fileKeyRef", "sessionAffinityConfig"),
        "schedulingGroup",
    }
)
VOLUMES = frozenset(("name", "emptyDir", "secret", "configMap", "hostPath", "persistentVolumeClaim"))
KEPT = ("type", "enum", "pattern", "format", "required", "minimum", "maximum", "minLength", "maxLength", "minItems")


def pruned(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """A schema with its references put in place, without what the page above names, whose objects are closed."""
    if "$ref" in schema:
        return pruned(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: schema[key] for key in KEPT if key in schema and schema[key] not in ("date-time", "")}
    for key in ("oneOf", "anyOf"):
        if key in schema:
            result[key] = [pruned(part, definitions) for part in schema[key]]
    if "items" in schema:
        result["items"] = pruned(schema["items"], definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = pruned(schema["additionalProperties"], definitions)
    properties = dict(schema.get("properties", {}))
    if properties:
        volume = {"name", "emptyDir", "secret"} <= set(properties)
        if "spec" in properties:
            properties.pop("status", None)  # what the cluster writes
        result["properties"] = {
            name: pruned(part, definitions)
            for name, part in properties.items()
            if name not in UNUSED and (not volume or name in VOLUMES)
        }
        result["additionalProperties"] = False
    return result


def metadata(definitions: dict[str, Any]) -> dict[str, Any]:
    return pruned(definitions["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"], definitions)


def main(crd: str, commit: str, openapi: str, version: str) -> None:
    definitions = json.loads(Path(openapi).read_text())["$defs"]
    (served,) = yaml.safe_load(Path(crd).read_text())["spec"]["versions"]
    jobset = pruned(served["schema"]["openAPIV3Schema"], {})
    jobset["properties"]["metadata"] = metadata(definitions)  # the CRD leaves it to the API server
    pages = {
        "jobset": {
            "$comment": f"github.com/kubernetes-sigs/jobset at {commit}, the CRD's openAPIV3Schema; Apache-2.0",
            "JobSet": jobset,
        },
        "kubernetes": {
            "$comment": f"github.com/kubernetes/kubernetes {version}, its OpenAPI document; Apache-2.0",
            "Job": pruned(definitions["io.k8s.api.batch.v1.Job"], definitions),
            "Deployment": pruned(definitions["io.k8s.api.apps.v1.Deployment"], definitions),
            "Service": pruned(definitions["io.k8s.api.core.v1.Service"], definitions),
        },
    }
    FOLDER.mkdir(exist_ok=True)
    for name, page in pages.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(page, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
