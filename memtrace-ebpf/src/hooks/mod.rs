//! One file per kind of record. A hook guards, reads, emits.

mod cgroup;
mod charge;
mod map;
mod oom;
mod percpu;
mod reclaim;
mod rss;
mod task;
