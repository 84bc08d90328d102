//! The life of memory cgroups: created, removed, moved into (kernel/cgroup/cgroup.c).

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use memtrace_common::control::Ring;
use memtrace_common::event::{CGROUP_MADE, CGROUP_REMOVED, CgroupAttach, CgroupChange, PATH_BYTES, PATH_CUT, UNKNOWN};

use crate::emit::{boot_ns, emit};
use crate::kernel::{self, cgroup_id, in_memory_hierarchy, pointer, read};
use crate::{field, layout, set};

/// `cgroup_mkdir(cgroup, path)`.
#[raw_tracepoint(tracepoint = "cgroup_mkdir")]
fn cgroup_mkdir(ctx: RawTracePointContext) -> i32 {
    change(ctx.arg(0), ctx.arg(1), CGROUP_MADE);
    0
}

/// `cgroup_rmdir(cgroup, path)`.
#[raw_tracepoint(tracepoint = "cgroup_rmdir")]
fn cgroup_rmdir(ctx: RawTracePointContext) -> i32 {
    change(ctx.arg(0), ctx.arg(1), CGROUP_REMOVED);
    0
}

#[inline(always)]
fn change(cgroup: u64, path: u64, change: u32) {
    if !in_memory_hierarchy(cgroup) {
        return;
    }
    let memcg = pointer(cgroup, layout!(cgroup_subsys) + 8 * layout!(memory_cgrp_id));
    let parent = pointer(pointer(cgroup, layout!(cgroup_kn)), layout!(kernfs_parent));
    emit::<CgroupChange>(Ring::Ledger, boot_ns(), |record| {
        kernel::read_memcg(memcg, field!(record.memcg));
        set!(record => {
            memcg.cgroup_id: cgroup_id(cgroup),
            parent_id: read(parent, layout!(kernfs_id)).unwrap_or(UNKNOWN),
            change: change,
        });
        let length = kernel::read_string(path, field!(record.path));
        set!(record => {
            path_len: length as u64,
            flags: if length >= PATH_BYTES - 1 { PATH_CUT } else { 0 },
        });
    });
}

/// `cgroup_attach_task(cgroup, path, task, threadgroup)`, after the move.
#[raw_tracepoint(tracepoint = "cgroup_attach_task")]
fn cgroup_attach(ctx: RawTracePointContext) -> i32 {
    let (cgroup, task): (u64, u64) = (ctx.arg(0), ctx.arg(2));
    if !in_memory_hierarchy(cgroup) {
        return 0;
    }
    emit::<CgroupAttach>(Ring::Ledger, boot_ns(), |record| {
        kernel::read_task(task, field!(record.task));
        set!(record => {
            cgroup_id: kernel::memcg_id(kernel::memcg_of(task)),
            whole_process: (ctx.arg::<i32>(3) as u8 != 0) as u64,
        });
    });
    0
}
