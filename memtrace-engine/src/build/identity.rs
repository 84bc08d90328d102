//! Finds container and pod in a cgroup path. Runtimes write ids into the path in a few known forms,
//! so no call to a runtime or to Kubernetes is needed. Example: `/kubepods/burstable/pod<uid>/<64
//! hex>`.

use memtrace_incident::{Container, Kubernetes};

/// Container and pod of a cgroup path, as far as the path names them.
///
/// The last container id counts, because a container may have cgroups of its own, and a node may be
/// a container itself (kind, k3d).
pub(crate) fn identify(path: &str) -> (Option<Container>, Option<Kubernetes>) {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let container = (0..parts.len()).rev().find_map(|at| {
        let parent = at.checked_sub(1).and_then(|above| parts.get(above)).copied();
        container(parts.get(at)?, parent)
    });
    (container, pod(&parts))
}

/// A container id in one component: `<prefix>-<64 hex>[.scope]`, `<slice>:<prefix>:<64 hex>`, `<64
/// hex>`.
fn container(part: &str, parent: Option<&str>) -> Option<Container> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = match part.rsplit_once([':', '-']) {
        Some((prefix, id)) => (prefix, id),
        None => ("", part),
    };
    if id.len() != 64 || !is_hex(id) {
        return None;
    }
    let runtime = match prefix.rsplit_once(':').map_or(prefix, |(_, prefix)| prefix) {
        // The monitor process of a container has a cgroup beside it.
        "crio-conmon" | "libpod-conmon" => return None,
        "cri-containerd" | "nerdctl" => Some("containerd"),
        "crio" => Some("cri-o"),
        "docker" => Some("docker"),
        "libpod" => Some("podman"),
        "" if parent == Some("docker") => Some("docker"),
        "" if parent == Some("libpod_parent") => Some("podman"),
        _ => None,
    };
    Some(Container { id: id.to_owned(), runtime: runtime.map(str::to_owned) })
}

/// The innermost pod of a path, with its quality of service.
fn pod(parts: &[&str]) -> Option<Kubernetes> {
    let (at, pod_uid) = parts.iter().enumerate().rev().find_map(|(at, part)| Some((at, pod_uid(part)?)))?;
    // The systemd driver has the class in the pod's own component, the cgroupfs driver in the one
    // above.
    let nearest = parts.get(..=at)?.iter().rev().take(2);
    let says = |class: &str| nearest.clone().any(|part| part.split(['-', '.', ':']).any(|word| word == class));
    let qos = if says("burstable") {
        "burstable"
    } else if says("besteffort") {
        "besteffort"
    } else {
        "guaranteed"
    };
    Some(Kubernetes { pod_uid, qos: Some(qos.to_owned()) })
}

/// The pod UID in one component: `pod<uid>`, `kubepods[-class]-pod<uid with _>.slice`,
/// `...-pod<uid>.slice:cri-containerd:<id>`.
fn pod_uid(part: &str) -> Option<String> {
    let part = part.split(':').next().unwrap_or(part);
    let part = part.strip_suffix(".slice").unwrap_or(part);
    let at = part.rfind("pod")?;
    if at > 0 && !part.get(..at)?.ends_with('-') {
        return None;
    }
    let uid = part.get(at..)?.strip_prefix("pod")?.replace('_', "-");
    is_uid(&uid).then_some(uid)
}

/// Whether `uid` has 8-4-4-4-12 hexadecimal digits, or 32 as for a static pod.
fn is_uid(uid: &str) -> bool {
    let groups: Vec<&str> = uid.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    (lengths == [8, 4, 4, 4, 12] || lengths == [32]) && groups.iter().all(|group| is_hex(group))
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa1";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb2";
    const UID: &str = "0a1b2c3d-1111-2222-3333-444455556666";
    const LOW: &str = "0a1b2c3d_1111_2222_3333_444455556666";
    const STATIC: &str = "0123456789abcdef0123456789abcdef";

    /// Container id, runtime, pod UID and class, with empty strings for `None`.
    fn of(path: &str) -> (String, String, String, String) {
        let (container, pod) = identify(path);
        let (id, runtime) = container.map_or_else(Default::default, |c| (c.id, c.runtime.unwrap_or_default()));
        let (uid, qos) = pod.map_or_else(Default::default, |p| (p.pod_uid, p.qos.unwrap_or_default()));
        (id, runtime, uid, qos)
    }

    #[test]
    fn every_known_form_of_path_names_its_container_and_pod() {
        let table: &[(String, &str, &str, &str, &str)] = &[
            (
                format!(
                    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{LOW}.slice/cri-containerd-{A}.scope"
                ),
                A,
                "containerd",
                UID,
                "burstable",
            ),
            (
                format!("/kubepods.slice/kubepods-pod{LOW}.slice/cri-containerd-{A}.scope"),
                A,
                "containerd",
                UID,
                "guaranteed",
            ),
            (format!("/kubepods/burstable/pod{UID}/{A}"), A, "", UID, "burstable"),
            (format!("/kubepods/besteffort/pod{UID}/{A}"), A, "", UID, "besteffort"),
            (format!("/kubepods/pod{UID}/{A}"), A, "", UID, "guaranteed"),
            (
                format!("/system.slice/kubepods-besteffort-pod{LOW}.slice:cri-containerd:{A}"),
                A,
                "containerd",
                UID,
                "besteffort",
            ),
            (format!("/kubepods.slice/kubepods-pod{LOW}.slice/crio-{A}.scope"), A, "cri-o", UID, "guaranteed"),
            (
                format!("/kubepods.slice/kubepods-pod{LOW}.slice/crio-{A}.scope/container"),
                A,
                "cri-o",
                UID,
                "guaranteed",
            ),
            (format!("/kubepods/burstable/pod{UID}/crio-{A}"), A, "cri-o", UID, "burstable"),
            (format!("/kubepods.slice/kubepods-pod{LOW}.slice/crio-conmon-{A}.scope"), "", "", UID, "guaranteed"),
            (format!("/docker/{A}"), A, "docker", "", ""),
            (format!("/system.slice/docker-{A}.scope"), A, "docker", "", ""),
            (format!("/system.slice/docker-{A}.scope/init.scope"), A, "docker", "", ""),
            (format!("/machine.slice/libpod-{A}.scope/container"), A, "podman", "", ""),
            (format!("/machine.slice/libpod-conmon-{A}.scope"), "", "", "", ""),
            (format!("/libpod_parent/libpod-{A}"), A, "podman", "", ""),
            (
                format!(
                    "/docker/{B}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                     kubelet-kubepods-burstable-pod{LOW}.slice/cri-containerd-{A}.scope"
                ),
                A,
                "containerd",
                UID,
                "burstable",
            ),
            (format!("/docker/{B}/kubelet.slice/kubelet.service"), B, "docker", "", ""),
            (format!("/docker/{B}/kubepods/besteffort/pod{UID}/{A}"), A, "", UID, "besteffort"),
            (format!("/kubepods/burstable/pod{STATIC}/{A}"), A, "", STATIC, "burstable"),
            (
                format!("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice"),
                "",
                "",
                STATIC,
                "burstable",
            ),
            ("/kubepods.slice/kubepods-burstable.slice".into(), "", "", "", ""),
            ("/system.slice/nginx.service".into(), "", "", "", ""),
            ("/user.slice/user-1000.slice/session-3.scope".into(), "", "", "", ""),
            (format!("/system.slice/tripod{UID}"), "", "", "", ""),
            (format!("/a/{}", &A[1..]), "", "", "", ""),
            (format!("/a/{}", A.to_uppercase()), "", "", "", ""),
            ("/".into(), "", "", "", ""),
            (String::new(), "", "", "", ""),
        ];
        for (path, id, runtime, uid, qos) in table {
            let expected = (id.to_string(), runtime.to_string(), uid.to_string(), qos.to_string());
            assert_eq!(of(path), expected, "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path_is_accepted(path in "[-/.:_a-f0-9podé]{0,200}") {
            identify(&path);
        }
    }
}
