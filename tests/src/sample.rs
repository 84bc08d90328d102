//! A small hand-written incident that follows the published contract, for tests to break.

use serde_json::{Value, json};

/// An OOM kill of one process with a curve of two readings.
pub fn incident() -> Value {
    let process = json!({ "pid": 4242, "tid": 4242, "start_boot_ns": 5_000_000_000_u64, "comm": "workload" });
    let cgroup = json!({
        "id": 77, "path": "/sample", "version": 2, "limit_bytes": 33_554_432, "usage_bytes": 33_554_432,
        "peak_bytes": 33_554_432, "high_bytes": null, "swap_usage_bytes": 0, "swap_limit_bytes": 0, "failcnt": 3,
        "container": null, "kubernetes": null,
    });
    json!({
        "schema": 1,
        "id": "01J00000000000000000000000",
        "kind": "oom_kill",
        "at": { "boot_ns": 9_000_000_000_u64, "wall": "2025-01-01T00:00:09.000000000Z", "wall_uncertainty_ns": 1000 },
        "host": {
            "hostname": "sample", "kernel": "6.1.0", "boot_id": "00000000-0000-0000-0000-000000000000", "cpus": 2,
            "memory_bytes": 1_073_741_824, "page_bytes": 4096, "charge_batch_bytes": 262_144,
        },
        "cgroup": cgroup,
        "oom": {
            "scope": "cgroup", "oom_cgroup": cgroup, "group_kill": false, "trigger": process,
            "trigger_cgroup": null, "trigger_kernel_stack": [],
            "victims": [{
                "pid": 4242, "start_boot_ns": 5_000_000_000_u64, "comm": "workload", "cgroup_id": 77,
                "cgroup_path": "/sample", "at_boot_ns": 9_000_000_000_u64, "anon_bytes": 30_000_000,
                "file_bytes": 1_000_000, "shmem_bytes": 0, "swap_bytes": 0, "pagetable_bytes": 90_112,
                "oom_score_adj": 0, "killed": true, "shares_mm": false, "exit_boot_ns": null,
            }],
            "tasks": [], "kernel_log": null,
        },
        "recording": null,
        "timeline": {
            "columns": {
                "boot_ns": [8_000_000_000_u64, 9_000_000_000_u64], "usage_bytes": [1_000_000, 33_554_432],
                "limit_bytes": [33_554_432, 33_554_432], "watermark_bytes": [1_000_000, 33_554_432],
                "anon_bytes": [900_000, 30_000_000], "file_bytes": [0, 1_000_000], "shmem_bytes": [0, 0],
                "swap_bytes": [0, 0], "swap_usage_bytes": [0, 0], "swap_limit_bytes": [null, null],
            },
            "thinned": 0,
        },
        "growth": [],
        "mappings": [],
        "allocation_paths": [],
        "composition": {
            "anon_bytes": 30_000_000, "file_bytes": 1_000_000, "shmem_bytes": 0, "swap_bytes": 0,
            "unattributed_bytes": 3_554_432,
        },
        "verdict": { "summary": "workload reached its limit.", "evidence": [] },
        "losses": [],
    })
}
