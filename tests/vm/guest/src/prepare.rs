//! Prepares a freshly booted kernel for tests: modules, file systems, cgroups, network.

use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind};
use rustix::net::{AddressFamily, SendFlags, SocketType, send, socket_with};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Mount point of cgroups.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Version 1 controllers to mount, if the kernel has them. `memory` is required.
const V1_CONTROLLERS: [&str; 6] = ["memory", "cpuset", "pids", "freezer", "cpu,cpuacct", "devices"];
/// Controllers that the root of version 2 delegates.
const V2_CONTROLLERS: &str = "+memory +cpuset +pids";
/// The cgroup in which tests make theirs, and on version 2 the child that they run in: only a
/// cgroup without processes can delegate controllers.
const TESTS: &str = "tests";
const RUNNER: &str = "runner";
/// The tests' disk, with a file system that the host made.
const SCRATCH: &CStr = c"/dev/vdb";

/// Does everything that comes before the first test.
pub(crate) fn machine() -> anyhow::Result<()> {
    let plain = MountFlags::empty();
    attach(c"proc", "/proc", c"proc", None)?;
    attach(c"sysfs", "/sys", c"sysfs", None)?;
    attach(c"devtmpfs", "/dev", c"devtmpfs", None)?;
    attach(c"tmpfs", "/dev/shm", c"tmpfs", None)?;
    attach(c"tmpfs", "/run", c"tmpfs", None)?;
    // not every kernel has it, and nothing needs it
    let _ = mount(c"tracefs", "/sys/kernel/tracing", c"tracefs", plain, None);
    modules()?;
    // a real disk: the kernel must account its pages as file memory and be able to reclaim them
    attach(SCRATCH, "/tmp", c"ext4", None)?;
    // as everywhere: programs of users make files there
    fs::set_permissions("/tmp", fs::Permissions::from_mode(0o1777)).context("failed to open /tmp to everybody")?;
    fs::create_dir_all("/var/tmp").context("failed to create /var/tmp")?;
    mount_bind("/tmp", "/var/tmp").context("failed to mount /tmp at /var/tmp")?;
    attach(c"out", "/tmp/out", c"9p", Some(c"trans=virtio,version=9p2000.L,msize=262144"))?;
    // console lines are slow here, and tests read the kernel log as it comes
    set("/proc/sys/kernel/printk", "1 1 1 1")?;
    set("/proc/sys/kernel/printk_devkmsg", "on\n")?;
    loopback().context("failed to bring up the loopback interface")?;
    let limit = Some(1 << 20);
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit })
        .context("failed to allow more open files")?;
    match crate::run::argument("cgroup").as_deref() {
        Some("v1") => cgroups_v1(),
        Some("v2") => cgroups_v2(),
        other => bail!("memtrace.cgroup= is v1 or v2, not {other:?}"),
    }
}

/// Moves the calling process into the cgroup for tests.
pub(crate) fn enter_tests() -> anyhow::Result<()> {
    let places = [format!("memory/{TESTS}"), format!("{TESTS}/{RUNNER}")];
    for place in places.iter().map(|place| Path::new(CGROUPS).join(place)).filter(|place| place.is_dir()) {
        set(place.join("cgroup.procs"), &std::process::id().to_string())?;
    }
    Ok(())
}

fn attach(source: &CStr, target: &str, kind: &CStr, options: Option<&CStr>) -> anyhow::Result<()> {
    fs::create_dir_all(target).with_context(|| format!("failed to create {target}"))?;
    match mount(source, target, kind, MountFlags::empty(), options) {
        // devtmpfs may be mounted already
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("failed to mount {kind:?} at {target}")),
    }
}

fn set(file: impl AsRef<Path>, value: &str) -> anyhow::Result<()> {
    let file = file.as_ref();
    fs::write(file, value).with_context(|| format!("failed to write {value} to {}", file.display()))
}

/// Loads the modules of this kernel, which the host numbered in load order.
fn modules() -> anyhow::Result<()> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let dir = Path::new("/modules").join(&release);
    let mut modules: Vec<PathBuf> = fs::read_dir(&dir)
        .with_context(|| format!("no modules for {release}"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()
        .with_context(|| format!("failed to read {}", dir.display()))?;
    modules.sort();
    for module in modules {
        let file = fs::File::open(&module).with_context(|| format!("failed to open {}", module.display()))?;
        match rustix::system::finit_module(file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(|| format!("failed to load {}", module.display())),
        }
    }
    Ok(())
}

/// Mounts each controller as a hierarchy of its own, and version 2 nowhere.
fn cgroups_v1() -> anyhow::Result<()> {
    attach(c"tmpfs", CGROUPS, c"tmpfs", None)?;
    for controller in V1_CONTROLLERS {
        let dir = format!("{CGROUPS}/{}", controller.split(',').next().unwrap_or(controller));
        let options = std::ffi::CString::new(controller).context("a controller's name has a NUL")?;
        let mounted = attach(c"cgroup", &dir, c"cgroup", Some(&options));
        match (controller, mounted) {
            ("memory", Err(error)) => return Err(error).context("this kernel has no memory controller on cgroup v1"),
            (_, Err(_)) => fs::remove_dir(&dir).with_context(|| format!("failed to remove {dir}"))?,
            (_, Ok(())) => {}
        }
    }
    let memory = Path::new(CGROUPS).join("memory");
    let hierarchy = memory.join("memory.use_hierarchy");
    // since 5.11 hierarchies always count children, and the file accepts nothing but 1
    if hierarchy.exists() {
        set(hierarchy, "1")?;
    }
    let clone = Path::new(CGROUPS).join("cpuset/cgroup.clone_children");
    if clone.exists() {
        set(clone, "1")?;
    }
    let tests = memory.join(TESTS);
    fs::create_dir(&tests).with_context(|| format!("failed to make cgroup {}", tests.display()))
}

/// Mounts the unified hierarchy alone.
fn cgroups_v2() -> anyhow::Result<()> {
    attach(c"cgroup2", CGROUPS, c"cgroup2", None)?;
    let tests = Path::new(CGROUPS).join(TESTS);
    let runner = tests.join(RUNNER);
    fs::create_dir_all(&runner).with_context(|| format!("failed to make cgroup {}", runner.display()))?;
    for dir in [Path::new(CGROUPS), &tests] {
        set(dir.join("cgroup.subtree_control"), V2_CONTROLLERS)?;
    }
    Ok(())
}

/// Does what `ip link set lo up` does: sends an RTM_NEWLINK for interface 1 with IFF_UP. The kernel
/// adds the address.
fn loopback() -> anyhow::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST: u16 = 1;
    const IFF_UP: u32 = 1;
    const LENGTH: u32 = 32;
    let mut message = Vec::new();
    // nlmsghdr: length, type, flags, sequence, port
    message.extend(LENGTH.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    // ifinfomsg: family, padding, type, index, flags, mask of the flags to change
    message.extend([0; 4]);
    message.extend(1u32.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    // protocol 0 of netlink is routes and links
    let flags = rustix::net::SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    send(&socket, &message, SendFlags::empty())?;
    Ok(())
}
