//! Hand-made incidents for tests: a burst kill, a group kill in an ancestor, a near miss, a
//! recording, and one with hostile content.

mod allocations;

use crate::*;

const MIB: u64 = 1 << 20;
const MS: u64 = 1_000_000;
const KILL: u64 = 5_025_123_456_789;
const POD: &str =
    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f5c1a52_8f0e_4a3e_9d0b_6f1f8f0e2c11.slice";

fn host() -> Host {
    Host {
        hostname: "node-7".into(),
        kernel: "6.1.0-18-cloud-amd64".into(),
        boot_id: "6f6f2c4e-5f0c-4d8e-8f43-6e8b1f0c2a11".into(),
        cpus: 8,
        memory_bytes: 33_608_957_952,
        page_bytes: 4096,
        charge_batch_bytes: 256 << 10,
        huge_page_bytes: None,
    }
}

fn columns(rows: &[(u64, u64, u64)], limit: Option<u64>) -> Timeline {
    let mut columns = Columns::default();
    let mut watermark = 0;
    for (boot_ns, usage, anon) in rows {
        watermark = watermark.max(*usage);
        columns.boot_ns.push(*boot_ns);
        columns.usage_bytes.push(Some(*usage));
        columns.limit_bytes.push(limit);
        columns.watermark_bytes.push(Some(watermark));
        columns.anon_bytes.push(*anon);
        columns.file_bytes.push(3 * MIB);
        columns.shmem_bytes.push(0);
        columns.swap_bytes.push(0);
        columns.swap_usage_bytes.push(Some(0));
        columns.swap_limit_bytes.push(None);
    }
    Timeline { columns, thinned: 12 }
}

fn process(pid: u32, comm: &str) -> Process {
    Process { pid, tid: pid, start_boot_ns: u64::from(pid) * 1_000_003, comm: comm.into() }
}

fn victim(pid: u32, comm: &str, cgroup: u64, anon: u64) -> Victim {
    Victim {
        pid,
        start_boot_ns: u64::from(pid) * 1_000_003,
        comm: comm.into(),
        cgroup_id: Some(cgroup),
        cgroup_path: None,
        at_boot_ns: KILL,
        anon_bytes: Some(anon),
        file_bytes: Some(3 * MIB + 400 * 1024),
        shmem_bytes: Some(0),
        swap_bytes: Some(0),
        pagetable_bytes: Some(anon / 500),
        oom_score_adj: Some(987),
        killed: true,
        shares_mm: false,
        exit_boot_ns: Some(KILL + 38_400_000),
    }
}

fn task(pid: u32, comm: &str, anon: u64, victim: bool) -> TaskRow {
    TaskRow {
        pid,
        start_boot_ns: Some(u64::from(pid) * 1_000_003),
        comm: comm.into(),
        anon_bytes: anon,
        file_bytes: 3 * MIB + 400 * 1024,
        shmem_bytes: 0,
        swap_bytes: 0,
        peak_bytes: anon + 4 * MIB,
        victim,
    }
}

fn growth(pid: u32, comm: &str, rss: u64, grown: [Option<i64>; 3]) -> Growth {
    Growth {
        pid,
        start_boot_ns: u64::from(pid) * 1_000_003,
        comm: comm.into(),
        rss_bytes: rss,
        last_100ms_bytes: grown[0],
        last_1s_bytes: grown[1],
        last_10s_bytes: grown[2],
    }
}

fn mapping(before_ms: u64, pid: u32, comm: &str, call: &str, change: i64) -> MappingNote {
    MappingNote {
        boot_ns: KILL - before_ms * MS,
        pid,
        comm: comm.into(),
        call: call.into(),
        address: Some(0x7f3a_4c00_0000 + before_ms * 0x1000_0000),
        change_bytes: change,
        small_mapped_bytes: 132 * 1024,
        small_unmapped_bytes: 0,
    }
}

fn mib(size: i64) -> Option<i64> {
    Some(size * (1 << 20))
}

/// A worker grows by 320 MiB within 200 ms and is killed by its own limit.
pub fn burst() -> Incident {
    let limit = 450 * MIB;
    let mut rows: Vec<(u64, u64, u64)> = (0..60)
        .map(|step| {
            let idle = 120 * MIB + (step % 7) * 512 * 1024;
            (KILL - 30_000 * MS + step * 490 * MS, idle, idle - 24 * MIB)
        })
        .collect();
    rows.extend((0..=40).map(|step| {
        let usage = 124 * MIB + (limit - 124 * MIB) * step / 40;
        (KILL - 200 * MS + step * 5 * MS, usage, usage - 24 * MIB)
    }));
    rows.push((KILL + 40 * MS, 40 * MIB, 8 * MIB));
    let path = format!("{POD}/cri-containerd-9c1f4b0a77e2f14f0b39f2ac5cdd2b6c74f4f7a4b7b2d9c7f2ce4a5c0be81d31.scope");
    let cgroup = Cgroup {
        id: 48_123,
        path: Some(path.clone()),
        version: 2,
        limit_bytes: Some(limit),
        usage_bytes: Some(limit),
        peak_bytes: Some(limit),
        high_bytes: None,
        swap_usage_bytes: Some(0),
        swap_limit_bytes: Some(0),
        failcnt: Some(37),
        container: Some(Container {
            id: "9c1f4b0a77e2f14f0b39f2ac5cdd2b6c74f4f7a4b7b2d9c7f2ce4a5c0be81d31".into(),
            runtime: Some("containerd".into()),
        }),
        kubernetes: Some(Kubernetes {
            pod_uid: "0f5c1a52-8f0e-4a3e-9d0b-6f1f8f0e2c11".into(),
            qos: Some("burstable".into()),
        }),
    };
    let anon = 418 * MIB + 310 * 1024;
    let (allocation_paths, allocations) = allocations::burst();
    Incident {
        schema: SCHEMA,
        id: "01KJHQ3V4D9T4X0Y6S5R2M8ZNC".into(),
        kind: Kind::OomKill,
        at: At { boot_ns: KILL, wall: "2026-03-01T03:12:45.123456789Z".into(), wall_uncertainty_ns: 850 },
        host: host(),
        cgroup: cgroup.clone(),
        oom: Some(Oom {
            scope: Scope::Cgroup,
            oom_cgroup: Some(cgroup),
            group_kill: false,
            trigger: Process { tid: 4250, ..process(4242, "worker") },
            trigger_cgroup: None,
            trigger_kernel_stack: [
                "mem_cgroup_out_of_memory",
                "try_charge_memcg",
                "charge_memcg",
                "__mem_cgroup_charge",
                "do_anonymous_page",
                "__handle_mm_fault",
                "handle_mm_fault",
                "do_user_addr_fault",
                "exc_page_fault",
                "asm_exc_page_fault",
            ]
            .map(String::from)
            .into(),
            victims: vec![victim(4242, "worker", 48_123, anon)],
            tasks: vec![
                task(4242, "worker", anon, true),
                task(4201, "supervisor", 6 * MIB, false),
                task(4260, "sh", MIB, false),
            ],
            kernel_log: Some(KernelLogKill {
                killed_line_ns: Some(KILL + 1_234_000),
                oom_line_ns: Some(KILL + 1_200_000),
                constraint: Some("CONSTRAINT_MEMCG".into()),
                oom_memcg: Some(path.clone()),
                task_memcg: Some(path),
                pid: 4242,
            }),
        }),
        pressure: None,
        recording: None,
        timeline: columns(&rows, Some(limit)),
        growth: vec![
            growth(4242, "worker", anon + 4 * MIB, [mib(163), mib(326), mib(327)]),
            growth(4201, "supervisor", 9 * MIB, [Some(0), Some(0), Some(-40_960)]),
            growth(4260, "sh", 4 * MIB, [None, None, None]),
        ],
        mappings: vec![
            mapping(8_320, 4201, "supervisor", "brk", 264 * 1024),
            mapping(203, 4242, "worker", "mmap", 512 * (1 << 20)),
        ],
        allocation_paths,
        allocations: Some(allocations),
        composition: Composition {
            anon_bytes: Some(anon + 7 * MIB),
            file_bytes: Some(10 * MIB),
            shmem_bytes: Some(0),
            swap_bytes: Some(0),
            unattributed_bytes: Some((limit - anon - 7 * MIB) as i64),
        },
        verdict: Verdict {
            summary: "`worker` grew by 326 MiB in the last 200 ms and reached the limit of its container in one go."
                .into(),
            evidence: vec![
                "usage was steady at 120 MiB (27 % of the limit) for at least 29.8 s before".into(),
                "one mmap of 512 MiB, 203 ms before the kill, larger than what the limit left".into(),
                "reclaim found nothing to free: 93 % of the usage was anonymous and there is no swap".into(),
            ],
        },
        losses: Vec::new(),
    }
}

/// A pod reaches its limit slowly; the kernel kills a group of three in one of its containers.
pub fn group() -> Incident {
    let limit = 1024 * MIB;
    let rows: Vec<(u64, u64, u64)> = (0..300)
        .map(|step| {
            let usage = 500 * MIB + 200 * MIB * step / 300;
            (KILL - 29_900 * MS + step * 100 * MS, usage, usage - 90 * MIB)
        })
        .collect();
    let mut incident = burst();
    (incident.allocation_paths, incident.allocations) = (Vec::new(), None);
    incident.id = "01KJHQ3V4DA1B2C3D4E5F6G7H8".into();
    incident.cgroup = Cgroup {
        id: 5_200,
        path: Some("/kubepods/burstable/pod42/app".into()),
        version: 1,
        limit_bytes: None,
        usage_bytes: Some(700 * MIB),
        peak_bytes: Some(702 * MIB),
        swap_usage_bytes: Some(720 * MIB),
        ..Cgroup::default()
    };
    let pod = Cgroup {
        id: 5_100,
        path: Some("/kubepods/burstable/pod42".into()),
        version: 1,
        limit_bytes: Some(limit),
        usage_bytes: Some(limit - 16 * 4096),
        peak_bytes: Some(limit),
        failcnt: Some(1),
        ..Cgroup::default()
    };
    let sizes = [("java", 7001, 410), ("python3", 7002, 120), ("logship", 7003, 60)];
    let mut victims: Vec<Victim> =
        sizes.iter().map(|(comm, pid, size)| victim(*pid, comm, 5_200, size * MIB)).collect();
    victims[1].killed = false;
    victims[2].exit_boot_ns = None;
    victims[2].swap_bytes = None;
    let mut tasks: Vec<TaskRow> = sizes.iter().map(|(comm, pid, size)| task(*pid, comm, size * MIB, true)).collect();
    tasks[0].swap_bytes = 20 * MIB;
    tasks.extend(
        (0..9).map(|number| task(7_100 + number, &format!("helper-{number}"), (9 - u64::from(number)) * MIB, false)),
    );
    incident.oom = Some(Oom {
        scope: Scope::Ancestor,
        oom_cgroup: Some(pod),
        group_kill: true,
        trigger: process(9_001, "nginx"),
        trigger_cgroup: Some(Cgroup {
            id: 5_300,
            path: Some("/kubepods/burstable/pod42/web".into()),
            ..Cgroup::default()
        }),
        trigger_kernel_stack: Vec::new(),
        victims,
        tasks,
        kernel_log: None,
    });
    incident.timeline = columns(&rows, None);
    incident.growth = vec![
        growth(7_001, "java", 413 * MIB, [mib(1), mib(5), mib(52)]),
        growth(7_108, "helper-8", 4 * MIB, [Some(4096), mib(1), mib(1)]),
        growth(9_001, "nginx", 11 * MIB, [Some(64 * 1024), Some(128 * 1024), mib(2)]),
    ];
    incident.mappings = vec![
        mapping(9_100, 7_001, "java", "mmap", 64 * (1 << 20)),
        mapping(7_000, 7_001, "java", "mmap", 32 * (1 << 20)),
        mapping(6_000, 7_001, "java", "munmap", -48 * (1 << 20)),
        mapping(5_000, 7_002, "python3", "brk", 2 * (1 << 20)),
        mapping(2_500, 7_001, "java", "mremap", 16 * (1 << 20)),
    ];
    incident.composition = Composition {
        anon_bytes: Some(635 * MIB),
        file_bytes: Some(41 * MIB),
        shmem_bytes: Some(0),
        swap_bytes: Some(20 * MIB),
        unattributed_bytes: Some(65 * (1 << 20)),
    };
    incident.verdict = Verdict {
        summary:
            "The pod as a whole ran out: `java` grew steadily by 5 MiB a second; the charge that failed was nginx's."
                .into(),
        evidence: vec!["usage of the pod rose by 200 MiB in 30 s, all of it in this container".into()],
    };
    incident.losses = vec![
        LossNote { what: "samples/ring_full".into(), count: Some(1_204) },
        LossNote { what: "kernel log not readable".into(), count: None },
    ];
    incident
}

/// A near miss: the cgroup of [`burst`], slowed down at its `memory.high`.
pub fn near_miss() -> Incident {
    let mut incident = burst();
    incident.kind = Kind::NearMiss;
    let tasks = incident.oom.take().map(|oom| oom.tasks).unwrap_or_default();
    incident.cgroup.high_bytes = Some(400 * MIB);
    incident.pressure = Some(Pressure {
        from_boot_ns: KILL,
        until_boot_ns: KILL + 4_900 * MS,
        limit: PressureLimit::High,
        hits: 42,
        stalled_ns: Some(1_200 * MS),
        oom_kill_disabled: None,
        under_oom_ns: None,
        tasks: tasks.into_iter().map(|task| TaskRow { victim: false, ..task }).collect(),
    });
    incident.verdict = Verdict {
        summary: "The cgroup was slowed down at its memory.high of 400 MiB.".into(),
        evidence: vec!["usage 400 MiB of memory.high 400 MiB".into()],
    };
    incident
}

/// `memtrace record -- make -j4 all`, 42 s.
pub fn recording() -> Incident {
    let start = KILL - 42_300 * MS;
    let rows: Vec<(u64, u64, u64)> = (0..=120)
        .map(|step: u64| {
            let hill = 120u64.saturating_sub(step.abs_diff(70) * 2) + 10;
            (start + step * 352 * MS, hill * 6 * MIB, hill * 4 * MIB)
        })
        .collect();
    let mut incident = burst();
    (incident.allocation_paths, incident.allocations) = (Vec::new(), None);
    incident.id = "01KJHQ3V4DZZZZZZZZZZZZZZZZ".into();
    incident.kind = Kind::Recording;
    incident.oom = None;
    incident.cgroup = Cgroup {
        id: 9_900,
        path: Some("/user.slice/user-1000.slice/memtrace-record-3117.scope".into()),
        version: 2,
        usage_bytes: Some(180 * MIB),
        peak_bytes: Some(781 * MIB),
        ..Cgroup::default()
    };
    let recorded = |pid: u32, comm: &str, peak: u64, max_rss: Option<u64>, exit_code: Option<u32>| RecordedProcess {
        pid,
        start_boot_ns: start + u64::from(pid - 3_117) * 250 * MS,
        comm: comm.into(),
        peak_bytes: Some(peak),
        max_rss_bytes: max_rss,
        exit_code,
    };
    incident.recording = Some(Recording {
        command: ["make", "-j4", "all"].map(String::from).into(),
        start_boot_ns: start,
        duration_ns: 42_300 * MS,
        exit_code: Some(2),
        signal: None,
        processes: vec![
            recorded(3_130, "ld", 390 * MIB, Some(390 * MIB + 128 * 1024), Some(9)),
            recorded(3_121, "cc1plus", 212 * MIB, Some(213 * MIB), Some(0)),
            recorded(3_122, "cc1plus", 198 * MIB, Some(198 * MIB), Some(256)),
            recorded(3_117, "make", 6 * MIB, None, None),
        ],
        processes_left_out: 212,
        oom_incidents: Vec::new(),
    });
    incident.timeline = columns(&rows, None);
    incident.growth = Vec::new();
    incident.mappings = vec![mapping(20_000, 3_130, "ld", "mmap", 256 * (1 << 20))];
    incident.composition =
        Composition { anon_bytes: Some(120 * MIB), unattributed_bytes: Some(60 * (1 << 20)), ..Composition::default() };
    incident.verdict = Verdict { summary: "`ld` was the largest process at 390 MiB.".into(), evidence: Vec::new() };
    incident
}

/// An incident with content that could harm a terminal or overflow arithmetic.
pub fn hostile() -> Incident {
    const EVIL: &str = "\u{1b}]0;owned\u{7}\u{1b}[2J\r\n\u{9b}31m\u{202e}\u{7f}";
    let mut incident = group();
    incident.at = At { boot_ns: u64::MAX, wall: EVIL.repeat(50), wall_uncertainty_ns: u64::MAX };
    incident.host =
        Host { hostname: EVIL.into(), kernel: EVIL.into(), memory_bytes: u64::MAX, cpus: u32::MAX, ..host() };
    let cgroup = Cgroup {
        id: u64::MAX,
        path: Some(EVIL.repeat(3)),
        version: u32::MAX,
        limit_bytes: Some(0),
        usage_bytes: Some(u64::MAX),
        peak_bytes: Some(u64::MAX),
        high_bytes: Some(u64::MAX),
        swap_usage_bytes: Some(u64::MAX),
        swap_limit_bytes: Some(0),
        failcnt: Some(u64::MAX),
        container: Some(Container { id: EVIL.into(), runtime: Some(EVIL.into()) }),
        kubernetes: Some(Kubernetes { pod_uid: EVIL.into(), qos: Some(EVIL.into()) }),
    };
    incident.cgroup = cgroup.clone();
    if let Some(oom) = &mut incident.oom {
        oom.oom_cgroup = Some(cgroup.clone());
        oom.trigger_cgroup = Some(cgroup);
        oom.trigger.comm = EVIL.into();
        oom.trigger_kernel_stack = vec![EVIL.into(); 100];
        for victim in &mut oom.victims {
            victim.comm = EVIL.into();
            victim.cgroup_path = Some(EVIL.into());
            victim.anon_bytes = Some(u64::MAX);
            victim.at_boot_ns = u64::MAX;
            victim.oom_score_adj = Some(i32::MIN);
        }
        for task in &mut oom.tasks {
            task.comm = EVIL.into();
            task.anon_bytes = u64::MAX;
            task.file_bytes = u64::MAX;
        }
        oom.kernel_log = Some(KernelLogKill {
            constraint: Some(EVIL.into()),
            oom_memcg: Some(EVIL.into()),
            killed_line_ns: Some(u64::MAX),
            ..KernelLogKill::default()
        });
    }
    incident.timeline.columns = Columns {
        boot_ns: vec![u64::MAX, 0, 7],
        usage_bytes: vec![Some(u64::MAX), None, Some(0)],
        anon_bytes: vec![u64::MAX],
        ..Columns::default()
    };
    for growth in &mut incident.growth {
        growth.comm = EVIL.into();
        growth.last_1s_bytes = Some(i64::MIN);
        growth.last_10s_bytes = Some(i64::MAX);
    }
    for note in &mut incident.mappings {
        note.comm = EVIL.into();
        note.call = EVIL.into();
        note.change_bytes = i64::MIN;
        note.small_mapped_bytes = u64::MAX;
    }
    incident.composition.unattributed_bytes = Some(i64::MIN);
    incident.verdict = Verdict { summary: EVIL.repeat(100), evidence: vec![EVIL.into(); 50] };
    incident.losses = vec![LossNote { what: EVIL.into(), count: Some(u64::MAX) }; 50];
    incident
}
